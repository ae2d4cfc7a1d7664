"""The convolutional image encoder: against products written out by hand, and its configuration."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from conftest import make_batch
from family_samples import make_conv_config
from pydantic import ValidationError

from conclave.base.errors import BadInputError
from conclave.model.building import build
from conclave.model.config import ModelConfig
from conclave.model.encoders.config import ImageConvConfig

GOOD = make_conv_config(patch=2).model_dump()


def convolved(x_CHW, weight_OCKK, stride, padding):
    """A convolution as four loops, in float64."""
    outs, channels, side, _ = weight_OCKK.shape
    height, width = (n + 2 * padding for n in x_CHW.shape[1:])
    padded = torch.zeros(channels, height, width, dtype=torch.float64)
    padded[:, padding : height - padding, padding : width - padding] = x_CHW
    rows, columns = (height - side) // stride + 1, (width - side) // stride + 1
    y = torch.zeros(outs, rows, columns, dtype=torch.float64)
    for out in range(outs):
        for row in range(rows):
            for column in range(columns):
                at = padded[:, row * stride : row * stride + side, column * stride : column * stride + side]
                y[out, row, column] = (at * weight_OCKK[out].double()).sum()
    return y


def pooled(x_CHW, side, stride):
    """The largest value of every window, as loops."""
    channels, height, width = x_CHW.shape
    y = torch.zeros(channels, (height - side) // stride + 1, (width - side) // stride + 1, dtype=torch.float64)
    for row in range(y.shape[1]):
        for column in range(y.shape[2]):
            at = x_CHW[:, row * stride : row * stride + side, column * stride : column * stride + side]
            y[:, row, column] = at.flatten(1).amax(1)
    return y


@pytest.mark.parametrize("project", [True, False])
@pytest.mark.parametrize("patch", [1, 2, 4])
def test_tokens_are_patches_of_what_the_convolutions_make(patch, project):
    config = make_conv_config(patch, channels=16 // patch**2, project=project)
    encoder = build(config, seed=3).encoder
    image_BCHW = make_batch(3)["image"]
    tokens_BTD = encoder(image_BCHW)
    assert tokens_BTD.shape == (3, config.encoder.token_count, config.width) == (3, (4 // patch) ** 2, 16)
    for image_CHW, tokens_TD in zip(image_BCHW, tokens_BTD, strict=True):
        x = image_CHW.double() - 0.3
        for layer, convolution in zip(config.encoder.layers, encoder.convolutions, strict=True):
            x = convolved(x, convolution.weight.detach(), layer.stride, layer.padding).tanh()
            x = pooled(x, layer.pool, layer.pool_stride)
        token = 0
        for row in range(0, 4, patch):
            for column in range(0, 4, patch):
                values = x[:, row : row + patch, column : column + patch].reshape(-1)
                expected = values if encoder.embed is None else encoder.embed.weight.detach().double() @ values
                if encoder.position is not None:
                    expected = expected + encoder.position.weight[token].detach().double()
                torch.testing.assert_close(tokens_TD[token].detach().double(), expected, rtol=1e-5, atol=1e-6)
                token += 1


def test_one_token_has_no_position():
    assert build(make_conv_config(patch=4), seed=3).encoder.position is None


def test_a_patch_that_is_a_token_must_be_as_wide_as_the_model():
    with pytest.raises(ValidationError, match=r"model\.width is 16, must be the 20 values of a patch"):
        make_conv_config(patch=2, channels=5, project=False)


def test_an_image_moves_its_own_tokens_only():
    encoder = build(make_conv_config(patch=2), seed=3).encoder
    image_BCHW = make_batch(4)["image"]
    changed = image_BCHW.clone()
    changed[2] = 1.0 - changed[2]
    same = (encoder(image_BCHW) == encoder(changed)).flatten(1).all(1)
    assert same.tolist() == [True, True, False, True]


def test_fresh_filters_have_the_configured_scale():
    config = make_conv_config(patch=4).model_dump()
    config["encoder"]["layers"] = [{"channels": 400, "kernel": 5}]
    config["init"]["conv"] = 3.0
    weight = build(ModelConfig.model_validate(config), seed=1).encoder.convolutions[0].weight
    # 10,000 values: the standard error of their deviation is 0.7 %, so 5 % is seven of them.
    assert float(weight.detach().std()) == pytest.approx(3.0 / math.sqrt(25), rel=0.05)


def oriented(*, channels: int = 16, side: int = 8, gain: float = 1.0, filters: str = "oriented") -> ModelConfig:
    config = make_conv_config(patch=4).model_dump()
    config["encoder"] |= {"height": side + 3, "width": side + 3, "channels": 3, "filters": filters}
    config["encoder"]["layers"] = [{"channels": channels, "kernel": side}]
    config["init"]["conv"] = gain
    return ModelConfig.model_validate(config)


def gaussian_derivative(order, angle, row, column, width):
    """By finite differences of the Gaussian itself, along a direction, in float64."""

    def bell(step):
        x, y = column + step * math.cos(angle), row + step * math.sin(angle)
        return math.exp(-(x * x + y * y) / (2 * width * width))

    h = 1e-3
    return bell(h) - bell(-h) if order == 1 else bell(h) - 2 * bell(0.0) + bell(-h)


@pytest.mark.parametrize("side", [3, 8])
def test_oriented_filters_are_derivatives_of_a_gaussian_in_all_directions(side):
    weight_OCKK = build(oriented(side=side), seed=1).encoder.convolutions[0].weight.detach().double()
    for number in range(16):
        order, angle = 1 + number % 2, math.pi * (number // 2) / 8
        places = [i - (side - 1) / 2 for i in range(side)]
        expected = torch.tensor(
            [[gaussian_derivative(order, angle, row, column, 3 * side / 16) for column in places] for row in places],
            dtype=torch.float64,
        )
        expected -= expected.mean()
        for channel in range(3):
            found = weight_OCKK[number, channel]
            cosine = float((found * expected).sum() / (found.norm() * expected.norm()))
            # A first derivative's sign is a convention of differences: falling to the right of a bell.
            assert cosine == pytest.approx(-1.0 if order == 1 else 1.0, abs=1e-5)


def test_oriented_filters_are_blind_to_brightness_and_as_long_as_random_ones_on_average():
    weight = build(oriented(gain=2.5), seed=1).encoder.convolutions[0].weight.detach()
    torch.testing.assert_close(weight.sum((2, 3)), torch.zeros(16, 3), rtol=0.0, atol=1e-5)
    torch.testing.assert_close(weight.flatten(1).norm(dim=1), torch.full((16,), 2.5))


@pytest.mark.parametrize("channels", [1, 2, 5])
def test_any_number_of_filters_differ_from_each_other(channels):
    weight = build(oriented(channels=channels), seed=1).encoder.convolutions[0].weight.detach()[:, 0].flatten(1)
    # Unit filters over three channels: a pair that were one, or one the other's negative, would have a cosine of ±1.
    cosine = 3.0 * weight @ weight.T
    torch.testing.assert_close(cosine.diagonal(), torch.ones(channels))
    assert float((cosine - torch.diag(cosine.diagonal())).abs().max()) < 0.95


def test_oriented_filters_are_the_same_for_every_seed_and_move_no_other_weight():
    first, second = build(oriented(), seed=1), build(oriented(), seed=2)
    random = build(oriented(filters="random"), seed=1)
    name = "encoder.convolutions.0.weight"
    assert torch.equal(first.state_dict()[name], second.state_dict()[name])
    differ = [key for key, value in random.state_dict().items() if not torch.equal(value, first.state_dict()[key])]
    assert differ == [name]


def test_filters_are_left_out_of_hashes_at_their_default():
    assert '"filters"' not in make_conv_config(patch=4).json_for_hash()
    assert '"filters":"oriented"' in oriented().json_for_hash()


def test_the_gain_of_convolutions_is_left_out_of_hashes_at_its_default():
    assert '"conv"' not in make_conv_config(patch=4).json_for_hash()
    document = make_conv_config(patch=4).model_dump()
    document["init"]["conv"] = 2.0
    assert '"conv":2.0' in ModelConfig.model_validate(document).json_for_hash()


@pytest.mark.parametrize("shape", [(1, 8, 7), (2, 8, 8), (1, 10, 8)])
def test_other_images_are_refused(shape):
    with pytest.raises(BadInputError, match="must be \\[1, 8, 8\\]"):
        build(make_conv_config(patch=4), seed=1).encoder(torch.zeros(2, *shape))


def test_padding_is_refused_since_a_convolution_would_mix_it_in():
    batch = dict(make_batch(2)) | {"length": torch.tensor([1, 4])}
    with pytest.raises(BadInputError, match=r"encoder\.kind is image-conv, must be another for examples with a length"):
        build(make_conv_config(patch=2, balance=0.0), seed=1)(batch)


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"patch": 3}, "patch is 3, must divide the sides 4 and 4 of the last map"),
        ({"layers": []}, "at least 1"),
        ({"layers": [{"channels": 1, "kernel": 1}] * 9}, "at most 8"),
        ({"layers": [{"channels": 2, "kernel": 9}]}, "layers.0.kernel is 9, must be at most the padded side 8"),
        (
            {"layers": [{"channels": 2, "kernel": 3, "stride": 4}, {"channels": 2, "kernel": 3}]},
            "layers.1.kernel is 3, must be at most the padded side 2",
        ),
        ({"layers": [{"channels": 2, "kernel": 3, "padding": 3}]}, "padding is 3, must be below the kernel 3"),
        (
            {"layers": [{"channels": 2, "kernel": 7, "pool": 3}]},
            "layers.0.pool is 3, must be at most what the convolution leaves",
        ),
        ({"layers": [{"channels": 0, "kernel": 3}]}, "greater than or equal to 1"),
        ({"layers": [{"channels": 2, "kernel": "3"}]}, "valid integer"),
        ({"layers": [{"channels": 2, "kernel": 3, "bias": True}]}, "Extra inputs are not permitted"),
        ({"scale": 0.0}, "greater than 0"),
        ({"filters": "gabor"}, "'random' or 'oriented'"),
        (
            {"filters": "oriented", "layers": [{"channels": 2, "kernel": 2, "pool": 2}]},
            "layers.0.kernel is 2, must be at least 3 with filters 'oriented'",
        ),
    ],
)
def test_what_does_not_fit_is_refused_with_what_is_allowed(changes, sentence):
    document = copy.deepcopy(GOOD)
    document["encoder"] |= changes
    with pytest.raises(ValidationError) as caught:
        ModelConfig.model_validate(document)
    assert sentence in caught.value.errors()[0]["msg"]


@pytest.mark.parametrize("side", range(5, 14))
@pytest.mark.parametrize(("kernel", "stride", "padding"), [(3, 1, 0), (3, 2, 1), (2, 3, 1), (1, 2, 0)])
@pytest.mark.parametrize(("pool", "pool_stride"), [(1, 1), (2, 1), (2, 2), (1, 3)])
def test_the_last_map_is_as_large_as_torch_makes_it(side, kernel, stride, padding, pool, pool_stride):
    layer = {"channels": 2, "kernel": kernel, "stride": stride, "padding": padding}
    layer |= {"pool": pool, "pool_stride": pool_stride}
    config = ImageConvConfig.model_validate({"height": side, "width": side + 1, "layers": (layer,), "patch": 1})
    made = torch.nn.Conv2d(1, 2, kernel, stride, padding)(torch.zeros(1, 1, side, side + 1))
    made = torch.nn.functional.max_pool2d(made, pool, pool_stride)
    assert config.map_sides == tuple(made.shape[2:])
    assert config.token_count == made.shape[2] * made.shape[3]
