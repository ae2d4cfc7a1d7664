"""The one door."""

from __future__ import annotations

import pytest
import torch
from ledger_samples import new_ledger, request
from safetensors.torch import load

from conclave.privacy.ledger import Reservation
from conclave.privacy.releases.release import release

EXPECTED = {"shared/a": torch.Size([2, 3]), "expert/0/1/up.weight": torch.Size([4])}


def output():
    return {name: torch.randn(shape) for name, shape in EXPECTED.items()}


def test_what_was_charged_leaves_and_is_stored(tmp_path):
    ledger = new_ledger(tmp_path)
    reservation, tensors = ledger.reserve(request(), bytes(32)), output()
    body = release(ledger, reservation, tensors, EXPECTED).body
    assert all(torch.equal(tensor, tensors[name]) for name, tensor in load(body).items())
    assert ledger.reserve(request(), bytes(32)).body == body


@pytest.mark.parametrize(
    "spoil",
    [
        lambda t: t.pop("shared/a"),  # a missing tensor would tell what the data touched
        lambda t: t.update({"loss": torch.zeros(1)}),
        lambda t: t.update({"shared/a": torch.zeros(3, 2)}),
        lambda t: t.update({"shared/a": torch.zeros(2, 3, dtype=torch.float64)}),
    ],
)
def test_anything_else_stays_and_the_charge_stays_reserved(tmp_path, spoil):
    ledger = new_ledger(tmp_path)
    reservation, tensors = ledger.reserve(request(), bytes(32)), output()
    spoil(tensors)
    with pytest.raises(ValueError, match="charged"):
        release(ledger, reservation, tensors, EXPECTED)
    assert [entry.state for entry in ledger.entries()] == ["RESERVED"]


def test_nothing_leaves_without_a_charge(tmp_path):
    ledger = new_ledger(tmp_path)
    with pytest.raises(ValueError, match="no reservation"):
        release(ledger, Reservation("f" * 64, request(), b""), output(), EXPECTED)
    assert ledger.entries() == []


def test_equal_outputs_give_equal_bytes(tmp_path):
    bodies = []
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        ledger = new_ledger(tmp_path / folder)
        tensors = {name: torch.ones(shape) for name, shape in EXPECTED.items()}
        ordered = tensors if folder == "a" else dict(reversed(tensors.items()))
        bodies.append(release(ledger, ledger.reserve(request(), bytes(32)), ordered, EXPECTED).body)
    assert bodies[0] == bodies[1]


def test_another_type_leaves_only_under_the_name_it_was_charged_for(tmp_path):
    """The list of names, shapes and types stays exact where an output was rounded: int8 instead of float32 or the
    other way round, and a scale more or less, stay on the node."""
    expected = {"packed/int8": torch.Size([6]), "packed/int8-scales": torch.Size([2]), "load/0": torch.Size([3])}
    dtypes = {"packed/int8": torch.int8, "packed/int8-scales": torch.bfloat16}
    good = {name: torch.ones(shape, dtype=dtypes.get(name, torch.float32)) for name, shape in expected.items()}
    ledger = new_ledger(tmp_path)
    reservation = ledger.reserve(request(), bytes(32))
    for spoil in (
        {"packed/int8": torch.ones(6)},
        {"packed/int8": torch.ones(6, dtype=torch.uint8)},
        {"packed/int8-scales": torch.ones(2)},
        {"packed/int8-scales": torch.ones(3, dtype=torch.bfloat16)},
        {"load/0": torch.ones(3, dtype=torch.bfloat16)},
        {"shared/a": torch.ones(6, dtype=torch.int8)},
        {"packed/int8-scales": None},
    ):
        output = {name: tensor for name, tensor in (good | spoil).items() if tensor is not None}
        with pytest.raises(ValueError, match="charged"):
            release(ledger, reservation, output, expected, dtypes=dtypes)
        with pytest.raises(ValueError, match="charged"):
            release(ledger, reservation, good, expected)
    assert [entry.state for entry in ledger.entries()] == ["RESERVED"]
    body = release(ledger, reservation, good, expected, dtypes=dtypes).body
    assert {name: (t.shape, t.dtype) for name, t in load(body).items()} == {
        name: (t.shape, t.dtype) for name, t in good.items()
    }
