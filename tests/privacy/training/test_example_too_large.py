"""A model of which one example takes more memory than a batch may take is refused, before anybody is charged for it."""

from __future__ import annotations

import pytest
import torch
from conftest import make_config
from node_samples import make_node
from plan_samples import plan
from torch import nn

import conclave.clients.capacity
import conclave.privacy.training.rehearsal
import conclave.server.trainable
from conclave.base.errors import BadInputError
from conclave.clients.capacity import ProcessMemory, room_for
from conclave.privacy.gradients.physical_batch import TRIED, Footprint, measured
from conclave.privacy.training.dpsgd_mechanism import DpSgd
from conclave.privacy.training.rehearsal import rehearse
from conclave.protocol.messages import AdmitRequest, ProtocolError
from conclave.server.scenario import read_scenario
from conclave.server.trainable import check_trainable
from conclave.simulations.shipped import find

PLAN = plan()
GIB = 1 << 30
SENTENCE = r"one example of this model takes 1024\.0 MiB in training, must be at most the 1024\.0 that a batch may take"


class Wide(nn.Module):
    """Needs 1 MiB for each example, whatever its parameters take."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(1))

    def forward(self, x_B: torch.Tensor) -> torch.Tensor:
        return (self.weight * x_B[:, None].expand(-1, 1 << 18)).sum(1)


def test_what_one_example_takes_is_measured():
    module = Wide()
    found = measured(lambda: module(torch.ones(TRIED)).sum().backward(), module, grams=False)
    assert 1 << 20 <= found.smallest < 4 << 20
    found.check_fits(found.smallest)
    with pytest.raises(BadInputError, match="one example of this model takes"):
        found.check_fits((1 << 20) - 1)


def test_pairs_count_where_norms_are_told_from_them():
    """A token sequence's rows are compared with each other: their square may be most of what one example takes."""
    Footprint(example=3, pair=4).check_fits(7)
    with pytest.raises(BadInputError, match="one example"):
        Footprint(example=3, pair=4).check_fits(6)
    Footprint(example=3, pair=4, unit=100).check_fits(7)  # of several examples, and those can be processed in parts


@pytest.fixture(params=[0, 1])
def taken(request, monkeypatch) -> int:
    """A model of which an example takes 1 GiB, and no byte or one byte more."""
    size = GIB + request.param
    for module in (conclave.privacy.training.rehearsal, conclave.server.trainable):
        monkeypatch.setattr(module, "rehearse", lambda *args: Footprint(size))
    return size


def test_a_node_refuses_more_than_a_gibibyte_before_it_charges(tmp_path, taken):
    node = make_node(tmp_path)
    asked = AdmitRequest(run_id="1", scenario="test", plan=PLAN)
    if taken == GIB:
        assert room_for(PLAN).examples == 1
        node.admit(asked)
        return
    with pytest.raises(ProtocolError, match=SENTENCE) as caught:
        node.admit(asked)
    assert caught.value.code == "not-allowed"
    assert node.ledger.entries() == []


def test_a_server_refuses_more_than_a_gibibyte_before_it_asks(taken):
    scenario = read_scenario(find("digits"), {"model.width": 8})
    if taken == GIB:
        check_trainable(scenario)
        return
    with pytest.raises(BadInputError, match=SENTENCE):
        check_trainable(scenario)


def test_a_node_with_less_memory_refuses_by_what_it_has(tmp_path, monkeypatch):
    """An eighth of the memory that is left to its process is for a batch."""
    mechanism = DpSgd.of(
        PLAN.privacy,
        steps=1,
        learning_rate=PLAN.training.learning_rate,
        optimizer=PLAN.training.optimizer,
        noise_multiplier=PLAN.noise_multiplier,
        declared_size=1,
    )
    smallest = rehearse(make_config(), mechanism).smallest
    assert PLAN.model == make_config()
    node = make_node(tmp_path)
    asked = AdmitRequest(run_id="1", scenario="test", plan=PLAN)
    for batch, fits in ((smallest - 1, False), (smallest, True)):
        monkeypatch.setattr(conclave.clients.capacity, "process_memory", lambda b=batch: ProcessMemory(8 * b, 0))
        monkeypatch.setattr(type(node.policy), "capacity", lambda self, model: 6)
        if fits:
            node.admit(asked)
        else:
            with pytest.raises(ProtocolError, match="one example of this model takes"):
                node.admit(asked)
            assert node.ledger.entries() == []
