"""Every layer with a rule, and some without, against microbatches: records and groups as units."""

from __future__ import annotations

import io
import warnings
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from conftest import make_batch, make_config, make_text, make_text_config
from family_samples import FAMILY, examples_for
from microbatches import alone, relative_error
from opacus.layers import DPGRU, DPLSTM, DPRNN
from torch import nn
from torch.utils.checkpoint import checkpoint

from conclave.base.errors import BadInputError
from conclave.model.building import build
from conclave.model.encoders.tokens import PositionTable
from conclave.model.layers.elementwise import Scale
from conclave.privacy.bookkeeping import Bookkeeper, Units
from conclave.privacy.bookkeeping.contributions import PerUnit
from conclave.privacy.bookkeeping.layers import register


class Net(nn.Module):
    """Layers in a row, then a loss that is not linear in their output."""

    def __init__(self, *layers: nn.Module) -> None:
        super().__init__()
        self.layers = nn.Sequential(*layers)

    def loss(self, batch):
        return self.layers(batch["x"]).flatten(1).square().mean(1).sqrt()


class TwoUses(Net):
    """The same layers used twice on the way."""

    def loss(self, batch):
        return self.layers(torch.tanh(self.layers(batch["x"]))).flatten(1).square().mean(1)


class Tied(nn.Module):
    """One table for looking up and for scores."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 6)
        self.mix = nn.Linear(6, 6)
        self.head = nn.Linear(6, 11, bias=False)
        self.head.weight = self.embed.weight

    def loss(self, batch):
        scores = self.head(torch.tanh(self.mix(self.embed(batch["x"]))))
        return F.cross_entropy(scores.transpose(1, 2), batch["x"].roll(1, 1), reduction="none").mean(1)


class Own(nn.Module):
    """A layer that nobody has a rule for."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Parameter(torch.randn(5))
        self.b = nn.Parameter(torch.randn(5))

    def forward(self, x):
        return torch.sin(x * self.a) + self.b


class Called(nn.Module):
    """A layer without a rule that is called as ``call`` says."""

    def __init__(self, layer, call) -> None:
        super().__init__()
        self.before, self.layer, self.call = nn.Linear(6, 6), layer, call

    def loss(self, batch):
        return torch.sin(self.call(self.layer, torch.tanh(self.before(batch["x"])))).flatten(1).sum(1)


class Tempered(nn.Module):
    """Takes a number, a keyword mask and an attribute; returns a tuple."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.warmth = nn.Parameter(torch.randn(6, 3)), 1.0

    def forward(self, x, temperature=1.0, *, mask=None, note=None):
        y = (x if mask is None else x * mask) @ self.weight / (temperature * self.warmth)
        return y, {"twice": 2 * y, "note": note}


def at_two_warmths(layer, x):
    layer.warmth = 0.1
    first = layer(x)[0]
    layer.warmth = 2.0
    return first + layer(x.flip(1))[0]


class Bags(nn.Module):
    """An embedding bag in one of its forms of call; its input is a record's ids."""

    def __init__(self, call, **options) -> None:
        super().__init__()
        self.bag, self.call = nn.EmbeddingBag(11, 4, **options), call
        self.share = nn.Embedding(11, 1).requires_grad_(call is with_weights)

    def loss(self, batch):
        return torch.sin(self.call(self.bag, batch["x"], self.share)).sum(1)


def with_offsets(bag, x, _):
    ends = torch.tensor([len(row) for row in x]).cumsum(0)
    starts = torch.cat([ends.new_zeros(1), ends if bag.include_last_offset else ends[:-1]])
    return bag(x.flatten(), offsets=starts)


def with_weights(bag, x, share):
    return bag(x, per_sample_weights=share(x).squeeze(-1))


class Recurrent(nn.Module):
    def __init__(self, kind, **options) -> None:
        super().__init__()
        self.recurrent = kind(5, 4, batch_first=True, **options)

    def loss(self, batch):
        return torch.sin(self.recurrent(batch["x"])[0]).flatten(1).sum(1)


def with_another_forward(layer):
    layer.forward = lambda x: F.linear(x, 2 * layer.weight, layer.bias)
    return Net(layer)


def with_hooks(layer):
    layer.register_forward_pre_hook(lambda _, args: (args[0] * 3,))
    layer.register_forward_hook(lambda _, args, output: output.square())
    layer.register_full_backward_pre_hook(lambda _, delta: (delta[0] * 2,))
    return Net(nn.Linear(6, 6), layer)


class InPlace(Net):
    def loss(self, batch):
        x = self.layers[0](batch["x"])
        F.relu_(x)
        return self.layers[1](x).square().mean(1)


def ids(*shape):
    return torch.randint(11, shape)


_CONV = nn.Conv2d(2, 4, (3, 2), padding=(1, 0), dilation=(1, 2))
CASES = {
    "linear, one row": lambda: (Net(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 3)), torch.randn(6, 5)),
    "linear, few wide rows (gram)": lambda: (Net(nn.Linear(40, 30), nn.Linear(30, 20)), torch.randn(6, 3, 40)),
    "linear, many rows (direct)": lambda: (Net(nn.Linear(4, 3), nn.Linear(3, 5)), torch.randn(6, 50, 4)),
    "linear, two axes of rows": lambda: (Net(nn.Linear(4, 3)), torch.randn(6, 2, 3, 4)),
    "linear, bias only": lambda: (Net(nn.Linear(5, 7).requires_grad_(False), nn.Linear(7, 3)), torch.randn(6, 5)),
    "embedding": lambda: (Net(nn.Embedding(11, 4)), ids(6, 9)),
    "embedding, one id": lambda: (Net(nn.Embedding(11, 4), nn.Flatten(), nn.Linear(4, 3)), ids(6, 1)),
    "embedding, padding": lambda: (Net(nn.Embedding(11, 4, padding_idx=2)), ids(6, 9)),
    "embedding and head tied": lambda: (Tied(), ids(6, 9)),
    "layer norm": lambda: (Net(nn.LayerNorm(8), nn.Linear(8, 3)), torch.randn(6, 4, 8)),
    "layer norm, two axes": lambda: (Net(nn.LayerNorm([4, 8])), torch.randn(6, 4, 8)),
    "rms norm": lambda: (Net(nn.Linear(8, 8), nn.RMSNorm(8), nn.Linear(8, 3)), torch.randn(6, 4, 8)),
    "group norm": lambda: (Net(nn.GroupNorm(2, 6)), torch.randn(6, 6, 5)),
    "conv1d": lambda: (Net(nn.Conv1d(3, 4, 3, padding=1, stride=2)), torch.randn(6, 3, 11)),
    "conv1d, reflect": lambda: (Net(nn.Conv1d(3, 4, 3, padding=2, padding_mode="reflect")), torch.randn(6, 3, 11)),
    "conv1d, same": lambda: (Net(nn.Conv1d(3, 4, 3, padding="same")), torch.randn(6, 3, 11)),
    "conv2d": lambda: (Net(_CONV, nn.ReLU(inplace=True), nn.Conv2d(4, 3, 3)), torch.randn(6, 2, 7, 8)),
    "conv2d, groups": lambda: (Net(nn.Conv2d(4, 6, 3, groups=2)), torch.randn(6, 4, 5, 5)),
    "conv2d, one position": lambda: (Net(nn.Conv2d(2, 4, 5)), torch.randn(6, 2, 5, 5)),
    "scalar": lambda: (Net(nn.Linear(5, 4), Scale(), nn.Linear(4, 2)), torch.randn(6, 3, 5)),
    "scale per channel": lambda: (Net(nn.Linear(5, 4), Scale(4), Scale(3, 1)), torch.randn(6, 3, 5)),
    "position table": lambda: (Net(nn.Linear(5, 4), PositionTable(3, 4), nn.Linear(4, 2)), torch.randn(6, 3, 5)),
    "used twice": lambda: (TwoUses(nn.Linear(5, 5), nn.LayerNorm(5)), torch.randn(6, 3, 5)),
    "fallback: instance norm": lambda: (Net(nn.InstanceNorm1d(4, affine=True)), torch.randn(6, 4, 9)),
    "fallback: conv3d": lambda: (Net(nn.Conv3d(2, 3, 2)), torch.randn(6, 2, 4, 4, 4)),
    "fallback: a layer of one's own": lambda: (Net(nn.Linear(5, 5), Own(), nn.Linear(5, 2)), torch.randn(6, 3, 5)),
    "embedding bag": lambda: (Bags(lambda bag, x, _: bag(x)), ids(6, 9)),
    "embedding bag, mean, padding": lambda: (Bags(lambda bag, x, _: bag(x), mode="mean", padding_idx=1), ids(6, 9)),
    "embedding bag, offsets": lambda: (Bags(with_offsets, mode="sum", padding_idx=2), ids(6, 9)),
    "embedding bag, all offsets": lambda: (Bags(with_offsets, mode="mean", include_last_offset=True), ids(6, 9)),
    "embedding bag, weights of ids": lambda: (
        Bags(with_weights, mode="sum"), ids(6, 9)),
    "lstm of Opacus": lambda: (Recurrent(DPLSTM, bidirectional=True), torch.randn(6, 3, 5)),
    "gru of Opacus": lambda: (Recurrent(DPGRU, num_layers=2), torch.randn(6, 3, 5)),
    "rnn of Opacus": lambda: (Recurrent(DPRNN, bias=False), torch.randn(6, 3, 5)),
    "fallback: conv3d, circular": lambda: (
        Net(nn.Conv3d(2, 4, 3, padding=1, padding_mode="circular", groups=2)), torch.randn(6, 2, 3, 4, 3)),
    "fallback: transposed": lambda: (Net(nn.ConvTranspose2d(2, 3, 3, stride=2)), torch.randn(6, 2, 4, 4)),
    "fallback: two inputs": lambda: (Called(nn.Bilinear(6, 6, 3), lambda m, x: m(x, x.flip(1))), torch.randn(6, 6)),
    "fallback: a number": lambda: (Called(Tempered(), lambda m, x: m(x, 0.1)[0]), torch.randn(6, 6)),
    "fallback: a keyword": lambda: (Called(Tempered(), lambda m, x: m(x=x, temperature=0.1)[0]), torch.randn(6, 6)),
    "fallback: a mask": lambda: (Called(Tempered(), lambda m, x: m(x, mask=(x > 0).float())[0]), torch.randn(6, 6)),
    "fallback: a dict": lambda: (Called(Tempered(), lambda m, x: m(x, note=1)[1]["twice"]), torch.randn(6, 6)),
    "fallback: changed between calls": lambda: (Called(Tempered(), at_two_warmths), torch.randn(6, 6)),
    "fallback: a forward of its own": lambda: (with_another_forward(nn.Linear(6, 3)), torch.randn(6, 6)),
    "a keyword for a rule": lambda: (Called(nn.Linear(6, 3), lambda m, x: m(input=x)), torch.randn(6, 6)),
    "hooks that change values": lambda: (with_hooks(nn.Linear(6, 6)), torch.randn(6, 6)),
    "checkpoint": lambda: (
        Called(nn.Sequential(nn.Linear(6, 6), nn.GELU()), lambda m, x: checkpoint(m, x, use_reentrant=False)),
        torch.randn(6, 6)),
    "fallback: checkpoint": lambda: (
        Called(nn.Sequential(nn.Linear(6, 6), nn.PReLU()), lambda m, x: checkpoint(m, x, use_reentrant=False)),
        torch.randn(6, 6)),
    "in place after a layer": lambda: (InPlace(nn.Linear(5, 5), nn.Linear(5, 2)), torch.randn(6, 5)),
}  # fmt: skip
MODELS = {
    "moe": (make_config(), make_batch),
    "moe, most experts unrouted": (make_config(routed=64, shared=0), make_batch),
    "transformer": (make_text_config(), make_text),
}
MODELS |= {name: (c, partial(examples_for, c)) for name, c in FAMILY.items()}
UNITS = {"records": torch.arange(6), "groups": torch.tensor([0, 0, 0, 1, 2, 2])}


def compare(module, loss, batch, unit_B):
    """Gradients, bounds and weighted sums against every unit alone."""
    hooks = [len(layer._forward_hooks) + len(layer._forward_pre_hooks) for layer in module.modules()]
    for p in module.parameters():
        if p.requires_grad:
            nn.init.normal_(p, std=0.5)
    truth = alone(module, loss, batch, unit_B)
    count = int(unit_B.max()) + 1
    units = Units.one_each(6) if count == 6 else Units(6, count, unit_B)
    weight_B = 1.0 / torch.bincount(unit_B)[unit_B]
    bookkeeper = Bookkeeper(module)
    found = bookkeeper.gradients(lambda: loss(batch) * weight_B, units)
    factor_U = torch.rand(count, dtype=torch.float64)
    factor_U[1] = 0.0
    sums, gradients = found.weighted_sums(factor_U), found.per_unit()
    bounds = dict(zip(found.reached, found.squared_bound_PU.sqrt(), strict=True))
    assert sums.keys() == truth.keys()
    for p, expected in truth.items():
        assert relative_error(gradients[p], expected) < 1e-5
        assert relative_error(sums[p], torch.einsum("u,u...->...", factor_U.float(), expected)) < 1e-5
        norm_U = expected.reshape(count, -1).double().norm(dim=1)
        assert (bounds[p] >= norm_U * (1 - 1e-5)).all()  # the truth is float32 itself, of another forward pass
        assert (bounds[p] <= norm_U * 1.02 + 1e-7).all()
    bookkeeper.close()
    assert [len(layer._forward_hooks) + len(layer._forward_pre_hooks) for layer in module.modules()] == hooks
    assert all(p.requires_grad for p in truth)
    return bookkeeper


@pytest.mark.parametrize("unit", UNITS)
@pytest.mark.parametrize("name", CASES)
def test_a_layer_equals_its_microbatches(name, unit):
    module, x = CASES[name]()
    bookkeeper = compare(module, module.loss, {"x": x}, UNITS[unit])
    assert bool(bookkeeper.fallbacks) == name.startswith("fallback")


@pytest.mark.parametrize("unit", UNITS)
@pytest.mark.parametrize("name", MODELS)
def test_a_model_equals_its_microbatches(name, unit):
    config, make = MODELS[name]
    network = build(config, seed=3)
    assert not compare(network, network.loss, make(6), UNITS[unit]).fallbacks


def test_bf16_models_take_norms_and_sums_in_float32():
    module = Net(nn.Linear(40, 30), nn.RMSNorm(30), nn.Linear(30, 20)).bfloat16()
    batch = {"x": torch.randn(6, 3, 40).bfloat16()}
    found = Bookkeeper(module).gradients(lambda: module.loss(batch), Units.one_each(6))
    gradients = found.per_unit()
    for p, bound in zip(found.reached, found.squared_bound_PU.sqrt(), strict=True):
        assert gradients[p].dtype == torch.float32
        assert (bound >= gradients[p].flatten(1).double().norm(dim=1) * (1 - 1e-6)).all()
    truth = alone(module, module.loss, batch, torch.arange(6))
    assert all(relative_error(gradients[p], truth[p]) < 0.05 for p in truth)  # bf16 has three digits


def in_its_old_form(normalise):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return normalise(nn.Linear(4, 4))


@pytest.mark.parametrize(
    ("layer", "instead"),
    [
        (nn.BatchNorm1d(4), "GroupNorm"),
        (nn.SyncBatchNorm(4), "GroupNorm"),
        (nn.InstanceNorm1d(4, affine=True, track_running_stats=True), "track_running_stats=False"),
        (nn.Dropout(0.1), "UnitDropout"),
        (nn.Embedding(4, 4, scale_grad_by_freq=True), "scale_grad_by_freq=False"),
        (nn.Embedding(4, 4, max_norm=1.0), "max_norm=None"),
        (nn.LSTM(4, 4), "DPLSTM"),
        (nn.LSTMCell(4, 4), "DPLSTMCell"),
        (nn.MultiheadAttention(4, 2), "MultiHeadAttention"),
        (nn.EmbeddingBag(4, 4, mode="max"), "mode='sum' or 'mean'"),
        (nn.ParameterList([nn.Parameter(torch.ones(4))]), "nn.ModuleList"),
        (nn.ParameterDict({"a": nn.Parameter(torch.ones(4))}), "nn.ModuleList"),
        (in_its_old_form(nn.utils.weight_norm), "remove_weight_norm"),
        (in_its_old_form(nn.utils.spectral_norm), "remove_spectral_norm"),
        (nn.utils.prune.l1_unstructured(nn.Linear(4, 4), "weight", 0.5), "prune.remove"),
        (nn.utils.parametrizations.weight_norm(nn.Linear(4, 4)), "remove_parametrizations"),
        (nn.DataParallel(nn.Linear(4, 4)), "the module inside it"),
        (nn.LazyLinear(4), "run it once"),
    ],
)
def test_layers_that_couple_examples_are_refused_by_name_with_the_replacement(layer, instead):
    with pytest.raises(BadInputError, match=f"layers.1 .*{type(layer).__name__}.*{instead}"):
        Bookkeeper(Net(nn.Linear(4, 4), layer))


def test_a_compiled_model_is_refused():
    in_place = nn.Linear(4, 4)
    in_place.compile()
    for module in (torch.compile(nn.Linear(4, 4)), in_place):
        with pytest.raises(BadInputError, match=r"use the module before torch\.compile"):
            Bookkeeper(module)


def test_a_parameter_beside_layers_is_refused():
    module = Net(nn.Linear(4, 4))
    module.token = nn.Parameter(torch.zeros(4))
    with pytest.raises(BadInputError, match=r"parameter token .*layer of its own"):
        Bookkeeper(module)


def test_rows_without_a_batch_axis_are_refused_instead_of_misattributed():
    class Flat(Net):
        def loss(self, batch):
            return self.layers(batch["x"].flatten(0, 1)).square().mean(1).view(6, 3).sum(1)

    module = Flat(nn.Linear(5, 2))
    with pytest.raises(BadInputError, match=r"layer layers.0 \(Linear\) saw 18 rows of 6 examples"):
        Bookkeeper(module).gradients(lambda: module.loss({"x": torch.randn(6, 3, 5)}), Units.one_each(6))


def test_an_input_changed_in_place_afterwards_is_noticed():
    class Careless(Net):
        def loss(self, batch):
            x = self.layers[0](batch["x"]) + 1.0
            y = self.layers[1](x)
            x.detach().add_(1.0)
            return y.square().mean(1)

    module = Careless(nn.Linear(5, 5), nn.Linear(5, 2))
    with pytest.raises(RuntimeError, match=r"layers\.1 was changed in place"):
        Bookkeeper(module).gradients(lambda: module.loss({"x": torch.randn(6, 5)}), Units.one_each(6))


def test_a_loss_that_is_not_one_value_per_example_is_refused():
    module = Net(nn.Linear(5, 2))
    with pytest.raises(BadInputError, match=r"loss has shape \[\], must be one value per example: \[6\]"):
        Bookkeeper(module).gradients(lambda: module.loss({"x": torch.randn(6, 5)}).sum(), Units.one_each(6))


def test_shortened_float32_products_are_refused():
    module = Net(nn.Linear(5, 2))
    torch.set_float32_matmul_precision("medium")
    try:
        with pytest.raises(RuntimeError, match="highest"):
            Bookkeeper(module).gradients(lambda: module.loss({"x": torch.randn(6, 5)}), Units.one_each(6))
    finally:
        torch.set_float32_matmul_precision("highest")


def test_a_tensor_without_the_batch_first_is_refused_also_where_its_length_is_the_batchs_by_chance():
    class Masked(nn.Module):
        def __init__(self, axis) -> None:
            super().__init__()
            self.weight, self.axis = nn.Parameter(torch.randn(5, 2)), axis

        def forward(self, x, mask):
            return torch.cat([mask @ (x @ self.weight)], self.axis)

    layer = Masked(0)
    with pytest.raises(BadInputError, match=r"given a tensor of shape \[3, 3\] for 6 examples"):
        Bookkeeper(layer).gradients(
            lambda: layer(torch.randn(6, 3, 5), torch.ones(3, 3)).sum((1, 2)), Units.one_each(6)
        )


def test_a_layer_that_draws_or_returns_something_per_batch_cannot_be_told_by_example():
    class Own(nn.Module):
        def __init__(self, what) -> None:
            super().__init__()
            self.weight, self.what = nn.Parameter(torch.randn(5)), what

        def forward(self, x):
            return self.what(x * self.weight)

    x = torch.randn(6, 5)
    for what, sentence in (
        (lambda y: F.dropout(y, 0.5), "cannot be run example by example"),
        (lambda y: y.sum(0), "the batch must be the first axis of what a layer returns"),
        (lambda y: 3, "must return tensors"),
    ):
        layer = Own(what)
        with pytest.raises(BadInputError, match=sentence):
            Bookkeeper(layer).gradients(lambda layer=layer: layer(x) * torch.ones(6), Units.one_each(6))


def test_nothing_stays_on_a_layer_without_a_rule():
    module = Net(nn.PReLU(), nn.Conv3d(2, 2, 1))
    before = {name: set(vars(layer)) for name, layer in module.named_modules()}
    bookkeeper = Bookkeeper(module)
    bookkeeper.gradients(lambda: module.loss({"x": torch.randn(6, 2, 2, 2, 2)}), Units.one_each(6))
    bookkeeper.close()
    assert {name: set(vars(layer)) for name, layer in module.named_modules()} == before
    torch.save(module, io.BytesIO())


def test_under_autocast_a_layer_without_a_rule_has_its_gradient_too():
    module = Net(nn.Linear(5, 5), nn.PReLU(), nn.Linear(5, 3))

    def loss(batch):
        with torch.autocast("cpu", torch.bfloat16):
            return torch.sin(module.layers(batch["x"]).float()).sum(1)

    batch = {"x": torch.randn(6, 5)}
    truth = alone(module, loss, batch, torch.arange(6))
    gradients = Bookkeeper(module).gradients(lambda: loss(batch), Units.one_each(6)).per_unit()
    assert all(relative_error(gradients[p], truth[p]) < 0.05 for p in truth)  # bf16 has three digits


def test_a_rule_that_leaves_out_a_parameter_is_refused():
    class Half(nn.Linear):
        pass

    @register(Half)
    def half(layer, inputs, delta, step):
        yield layer.bias, PerUnit(step.units.add_up(delta))

    module = Net(Half(5, 2))
    with pytest.raises(BadInputError, match=r"the rule for layer layers.0 \(Half\) leaves out a trained parameter"):
        Bookkeeper(module).gradients(lambda: module.loss({"x": torch.randn(6, 5)}), Units.one_each(6))
