"""What a checkpoint holds is all that a run needs to go on as if it had never stopped."""

from __future__ import annotations

import pytest
import torch
from conftest import make_config
from server_samples import SmallFederation, ask, delta_for, held_of, make_plan, train_reply

from conclave.base.errors import BadInputError
from conclave.model import parameters
from conclave.model.building import build
from conclave.server.rounds.checkpoint import read_checkpoint, write_checkpoint
from conclave.server.rounds.model_state import initial_tensors

OPTIONS = {
    "optimizer": {"kind": "adam", "decay": 0.9, "warmup_rounds": 2},
    "average": {"kind": "moving", "decay": 0.5},
    "min_holders": 2,
}


def carry_out(federation, *numbers):
    for number in numbers:
        replies = [
            train_reply(request, delta_for(request, federation, 0.001 * number * (-1) ** request.metadata.dst_node_id))
            for request in ask(federation, number)
        ]
        assert federation.answer(number, replies).changed


def test_a_run_that_was_stopped_goes_on_to_the_same_bits(tmp_path):
    whole, before, after = (SmallFederation(**OPTIONS) for _ in range(3))
    carry_out(whole, 1, 2, 3, 4)
    carry_out(before, 1, 2)
    write_checkpoint(tmp_path / "checkpoint", before.model.checkpoint(2))
    after.model.restore(read_checkpoint(tmp_path / "checkpoint"))
    after.books = before.books
    carry_out(after, 3, 4)
    for number, federation in enumerate((whole, after)):
        write_checkpoint(tmp_path / str(number), federation.model.checkpoint(4))
    assert (tmp_path / "0").read_bytes() == (tmp_path / "1").read_bytes()
    for name, tensor in whole.model.published.items():
        assert torch.equal(tensor, after.model.published[name])
    assert any(not torch.equal(tensor, whole.model.tensors[name]) for name, tensor in whole.model.published.items())


def test_what_nodes_sent_before_is_known_again_and_the_checkpoint_stays_as_it_is():
    first, again = (SmallFederation(noise_test={}) for _ in range(2))
    (request, *_) = ask(first)
    sent = delta_for(request, first)
    standardised = first.model.noise_test.standardise(held_of(request), sent, 100)
    first.model.noise_test.remember("0" * 16, standardised)
    checkpoint = first.model.checkpoint(1)
    again.model.restore(checkpoint)
    again.model.noise_test.remember("0" * 16, standardised)
    for name, tensor in checkpoint.history["0" * 16].items():
        assert torch.equal(2 * tensor, again.model.noise_test.history["0" * 16][name])


def test_the_checkpoint_of_another_model_or_another_optimizer_is_refused():
    other = SmallFederation(**OPTIONS)
    carry_out(other, 1)
    with pytest.raises(BadInputError, match="another optimizer's state than that of 'sgd'"):
        SmallFederation().model.restore(other.model.checkpoint(1))
    with pytest.raises(BadInputError, match="other tensors than the scenario's model"):
        SmallFederation(plan=make_plan(model=make_config(hidden=16))).model.restore(other.model.checkpoint(1))


def test_a_model_begins_as_it_is_built_but_for_experts_that_stay_which_are_silent():
    plan = make_plan(local_experts=2)
    network = build(plan.model, 7)
    built = parameters.split(network.state_dict(), network.held)
    begun = initial_tensors(plan, 7)
    assert begun.keys() == built.keys()
    silent = {name for name in built if name.split("/")[0] == "expert" and int(name.split("/")[2]) in (4, 5)}
    assert silent
    for name, tensor in begun.items():
        assert torch.equal(tensor, torch.zeros_like(tensor) if name in silent else built[name])
