"""Encodings of deltas: unbiased by closed form, errors below a step, hostile values refused, nothing but the secret."""

from __future__ import annotations

import math
from fractions import Fraction

import numpy as np
import pytest
import torch
from torch import Size

import conclave.protocol.encodings
from conclave.protocol.encodings import WireForm, encodings_of, norm_growth, wire_form

SHAPES = {
    "shared/matrix": Size([5, 7]),
    "shared/vector": Size([11]),
    "shared/scalar": Size([]),
    "expert/0/1/cube": Size([3, 2, 4]),
    "shared/nothing": Size([0, 3]),
    "load/0": Size([6]),
}
PARAMETERS = {name: shape for name, shape in SHAPES.items() if name != "load/0"}
SECRET = bytes(range(32))
LOSSY = ("bf16", "int8")


def form_of(encoding, shapes=PARAMETERS) -> WireForm:
    return wire_form(SHAPES if shapes is PARAMETERS else shapes, encodings_of(encoding, shapes))


def some(scale=1.0, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return {name: scale * torch.randn(shape, generator=generator) for name, shape in SHAPES.items()}


def rows_of(tensor):
    return tensor.reshape(1, -1) if tensor.ndim < 2 else tensor.flatten(1)


def is_bfloat16(value: Fraction) -> bool:
    return float(torch.tensor(float(value)).bfloat16()) == value


def with_words(monkeypatch, words, dtype):
    """Round by these words, which come round again, instead of a secret's stream."""

    def given(secret, count):
        return np.resize(np.asarray(words, dtype=dtype), 8 * count // np.dtype(dtype).itemsize).view(np.uint64)

    monkeypatch.setattr(conclave.protocol.encodings, "uniform_words", given)


def test_names_shapes_and_types_on_the_wire_follow_from_shapes_alone():
    """Rows: 5 + 1 + 1 + 3 + 0; values: 35 + 11 + 1 + 24 + 0. What has no encoding travels as it is."""
    int8, bf16, fp32 = map(form_of, ("int8", "bf16", "fp32"))
    load = ("load/0", Size([6]), torch.float32)

    def listed(form):
        return {(name, shape, form.dtypes[name]) for name, shape in form.shapes.items()}

    packed, scales = ("packed/int8", Size([71]), torch.int8), ("packed/int8-scales", Size([10]), torch.bfloat16)
    assert listed(int8) == {packed, scales, load}
    assert listed(bf16) == {("packed/bf16", Size([71]), torch.bfloat16), load}
    assert listed(fp32) == {(name, shape, torch.float32) for name, shape in SHAPES.items()}
    for form in (int8, bf16, fp32):
        sent = form.encode(some(), SECRET)
        assert {(name, t.shape, t.dtype) for name, t in sent.items()} == listed(form)
        back = form.decode(sent)
        assert {name: t.shape for name, t in back.items()} == SHAPES
        assert all(t.dtype == torch.float32 for t in back.values())
        assert torch.equal(back["load/0"], some()["load/0"])


def test_float32_travels_without_a_copy():
    tensors = some()
    form = form_of("fp32")
    assert all(tensor is tensors[name] for name, tensor in form.decode(form.encode(tensors, SECRET)).items())


def test_a_packed_name_cannot_be_a_tensors():
    for name in ("packed/int8", "packed/int8-scales", "packed/bf16", "packed/other"):
        with pytest.raises(ValueError, match="packed"):
            wire_form({name: Size([1])}, {})
    with pytest.raises(ValueError, match="does not travel"):
        wire_form({"shared/a": Size([1])}, {"shared/b": "int8"})


@pytest.mark.parametrize("size", [1e-44, 3e-39, 1e-30, 1e-3, 1.0, 1e15])
def test_int8_is_a_neighbour_on_the_grid_of_its_row(size):
    """Against exact fractions: the scale, and each value one of the two next multiples of it."""
    tensors, form = some(size), form_of("int8")
    sent = form.encode(tensors, SECRET)
    steps, scales = sent["packed/int8"].tolist(), sent["packed/int8-scales"].tolist()
    back = form.decode(sent)
    for name in sorted(PARAMETERS):
        for row, decoded in zip(rows_of(tensors[name]), rows_of(back[name]), strict=True):
            if not len(row):
                continue
            scale = Fraction(scales.pop(0))
            most = max(abs(Fraction(value)) for value in row.tolist())
            assert is_bfloat16(scale)
            assert scale == Fraction(2) ** -126 or most / 127 < scale <= most / 127 * Fraction(129, 128)
            for value, got in zip(row.tolist(), decoded.tolist(), strict=True):
                step = steps.pop(0)
                assert step in (math.floor(Fraction(value) / scale), math.ceil(Fraction(value) / scale))
                assert Fraction(got) == step * scale  # decoding rounds nothing
    assert steps == scales == []


@pytest.mark.parametrize("size", [1e-41, 1e-3, 1.0, 1e15])
def test_bfloat16_is_a_neighbour(size):
    tensors, form = some(size), form_of("bf16")
    back = form.decode(form.encode(tensors, SECRET))
    for name in PARAMETERS:
        for value, got in zip(tensors[name].flatten().tolist(), back[name].flatten().tolist(), strict=True):
            down = torch.tensor(value).view(torch.int32) & -65536
            near = {float(bits.view(torch.float32)) for bits in (down, down + 65536)}
            assert got == value if is_bfloat16(Fraction(value)) else got in near


@pytest.mark.parametrize("eighths", [1, 3, 1000, -1, -4, -7, 1015, -1015, 8, -16])
def test_int8_is_unbiased_by_closed_form(monkeypatch, eighths):
    """The mean over a grid of uniforms that divides the fraction is the value itself."""
    words = (np.arange(64, dtype=np.uint64) << np.uint64(26)) + np.uint64(1 << 25)
    with_words(monkeypatch, words, np.uint32)
    shapes = {"shared/a": Size([128])}
    form = form_of("int8", shapes)
    most = 126.5
    scale = float(form.encode({"shared/a": torch.full([128], most)}, SECRET)["packed/int8-scales"])
    value = eighths / 8 * scale  # in float32: a scale has 8 bits
    row = torch.full([128], value)
    row[127] = 127 * scale * (1 - 2**-9)  # sets the same scale
    sent = form.encode({"shared/a": row}, SECRET)
    assert float(sent["packed/int8-scales"]) == scale
    assert sum(map(Fraction, form.decode(sent)["shared/a"][:64].tolist())) / 64 == Fraction(value)


@pytest.mark.parametrize("value", [1.0, 1.0000001, -1.0000001, 0.1, -2.9999998, 3.1e-41, 1e30])
def test_bfloat16_is_unbiased_by_closed_form(monkeypatch, value):
    """The mean over all 2^16 draws, in exact arithmetic, is the value itself."""
    with_words(monkeypatch, np.arange(65536), np.uint16)
    shapes = {"shared/a": Size([65536])}
    form = form_of("bf16", shapes)
    tensor = torch.full([65536], value)
    decoded = form.decode(form.encode({"shared/a": tensor}, SECRET))["shared/a"]
    assert sum(map(Fraction, decoded.tolist())) / 65536 == Fraction(float(tensor[0]))


@pytest.mark.parametrize("encoding", LOSSY)
def test_the_stream_itself_rounds_without_bias(encoding):
    """200 values, 2,000 secrets. Errors lie within a step, so Hoeffding bounds their means: a false alarm
    is below 3e-6 (errors of a value span one step)."""
    shapes = {"shared/a": Size([2, 100])}
    tensor = torch.randn(2, 100, generator=torch.Generator().manual_seed(3)).clamp(-2, 2)
    form = form_of(encoding, shapes)
    sent = form.encode({"shared/a": tensor}, SECRET)
    steps = (
        sent["packed/int8-scales"].double()[:, None] if encoding == "int8" else 2.0 ** (tensor.abs().log2().floor() - 7)
    )
    secrets = [number.to_bytes(32, "big") for number in range(2000)]
    decoded = torch.stack([form.decode(form.encode({"shared/a": tensor}, s))["shared/a"] for s in secrets])
    errors = (decoded.double() - tensor) / steps
    assert errors.abs().max() < 1
    assert errors.std() > 0.2  # it was rounded at all
    assert errors.mean(0).abs().max() < math.sqrt(math.log(2 * 200 / 1e-6) / (2 * 2000))
    assert abs(errors.mean()) < math.sqrt(math.log(2 / 1e-6) / (2 * 2000 * 200))


@pytest.mark.parametrize("encoding", LOSSY)
def test_rounding_is_a_function_of_its_secret_alone(encoding):
    """Neither torch's nor numpy's global generator is read, or moved."""
    form, tensors = form_of(encoding), some()
    state, legacy = torch.get_rng_state(), np.random.get_state()[1].tolist()

    def sent(secret):
        return {name: tensor.view(torch.uint8).tolist() for name, tensor in form.encode(tensors, secret).items()}

    first = sent(SECRET)
    assert torch.equal(torch.get_rng_state(), state)
    assert np.random.get_state()[1].tolist() == legacy
    torch.manual_seed(99)
    assert sent(SECRET) == first
    assert sent(bytes(32)) != first


def test_zeros_stay_zeros_and_the_largest_values_stay_in_range():
    tensors = {name: torch.zeros(shape) for name, shape in SHAPES.items()}
    tensors["shared/matrix"][1] = 127.0  # every value is the row's largest
    tensors["shared/matrix"][2] = -2.54
    for encoding in LOSSY:
        form = form_of(encoding)
        for number in range(50):
            sent = form.encode(tensors, number.to_bytes(32, "big"))
            back = form.decode(sent)
            assert all(torch.equal(back[n] == 0, tensors[n] == 0) for n in PARAMETERS)
            if encoding == "int8":
                assert sent["packed/int8"].min() >= -127


def test_every_draw_keeps_minus_128_out(monkeypatch):
    shapes = {"shared/a": Size([4])}
    form = form_of("int8", shapes)
    for word in (0, 2**32 - 1):
        with_words(monkeypatch, [word], np.uint32)
        for exponent in range(-149, 120):
            for factor in (1.0, 1.0 + 2**-23, 1.9999999, 127 / 64, 127 / 64 * (1 + 2**-23)):
                value = math.ldexp(factor, exponent)
                sent = form.encode({"shared/a": torch.tensor([value, -value, 0.0, value / 3])}, SECRET)
                assert sent["packed/int8"].abs().max() <= 127
                assert sent["packed/int8"].min() >= -127
                form.decode(sent)


@pytest.mark.parametrize("bad", [math.nan, -math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("encoding", LOSSY)
def test_what_is_not_finite_is_sent_so_that_it_is_refused(encoding, bad):
    form, tensors = form_of(encoding), some()
    tensors["shared/matrix"][3, 2] = bad
    for number in range(50):
        sent = form.encode(tensors, number.to_bytes(32, "big"))
        if encoding == "int8":
            with pytest.raises(ValueError, match="scale"):
                form.decode(sent)
        else:
            assert not form.decode(sent)["shared/matrix"][3, 2].isfinite()


@pytest.mark.parametrize("scale", [math.nan, math.inf, -math.inf, -1.0, -0.0, 2.0**-127, -(2.0**-130)])
def test_hostile_scales_are_refused(scale):
    form = form_of("int8")
    sent = form.encode(some(), SECRET)
    sent["packed/int8-scales"][4] = scale
    with pytest.raises(ValueError, match="scale"):
        form.decode(sent)


def test_minus_128_is_refused():
    form = form_of("int8")
    sent = form.encode(some(), SECRET)
    sent["packed/int8"][-1] = -128
    with pytest.raises(ValueError, match="-128"):
        form.decode(sent)


@pytest.mark.parametrize("encoding", LOSSY)
@pytest.mark.parametrize(
    "spoil",
    [
        lambda tensors: tensors.pop("shared/vector"),
        lambda tensors: tensors.update({"shared/matrix": torch.ones(7, 5)}),  # as many values
        lambda tensors: tensors.update({"shared/matrix": torch.ones(35)}),
        lambda tensors: tensors.update({"shared/matrix": torch.ones(5, 7, dtype=torch.float64)}),
    ],
)
def test_what_was_not_expected_is_not_packed(encoding, spoil):
    """The door cannot see into a packed tensor: names, shapes and types are checked before."""
    tensors = some()
    spoil(tensors)
    with pytest.raises(ValueError, match="name, shape and type"):
        form_of(encoding).encode(tensors, SECRET)


def test_an_extra_tensor_is_left_for_the_door_to_refuse():
    sent = form_of("int8").encode(some() | {"loss": torch.ones(1)}, SECRET)
    assert sent.keys() - form_of("int8").shapes.keys() == {"loss"}


def test_int8_to_nearest_does_not_exist():
    with pytest.raises(ValueError, match="at random"):
        form_of("int8").encode(some(), None)


def test_without_a_secret_bfloat16_is_rounded_to_nearest():
    tensors, form = some(), form_of("bf16")
    back = form.decode(form.encode(tensors, None))
    assert all(torch.equal(back[name], tensors[name].bfloat16().float()) for name in PARAMETERS)


@pytest.mark.parametrize("encoding", LOSSY)
@pytest.mark.parametrize("word", [0, 2**32 - 1, None])
def test_no_draw_makes_tensors_longer_than_the_growth(monkeypatch, encoding, word):
    """The worst rows: one spike, and many values that are each rounded up from a step or so."""
    if word is not None:
        with_words(monkeypatch, [word], np.uint32)
    shapes = {"shared/a": Size([3, 4000]), "shared/b": Size([9])}
    encodings = encodings_of(encoding, shapes)
    form, growth = wire_form(shapes, encodings), norm_growth(shapes, encodings)
    ratios = []
    for many in (1e-6, -1e-6, 0.00794, -0.00794, 0.3, -0.3):
        tensors = {name: torch.full(shape, many) for name, shape in shapes.items()}
        tensors["shared/a"][:, 0] = 1.0
        back = form.decode(form.encode(tensors, SECRET))
        before, after = (math.hypot(*(float(t.double().norm()) for t in ts.values())) for ts in (tensors, back))
        ratios.append(after / before)
    assert max(ratios) <= growth
    assert growth == (1 + math.sqrt(4000) / 126 if encoding == "int8" else 1 + 2**-7)
    if encoding == "int8" and word:  # a bound without the growth would refuse honest replies
        assert max(ratios) > 1.2


def test_float32_does_not_grow():
    assert norm_growth(PARAMETERS, encodings_of("fp32", PARAMETERS)) == 1.0
