"""What a round asks of nodes: to each its part of the model, and no more."""

from __future__ import annotations

import torch
from server_samples import SmallFederation, ask, describe, held_of, make_plan, received

from conclave.model import parameters
from conclave.protocol.codec import decode, tensors_of
from conclave.protocol.encodings import encodings_of
from conclave.protocol.messages import TrainRequest


def test_a_request_carries_exactly_the_nodes_part():
    federation = SmallFederation(nodes=4)
    now = federation.values()
    for request in ask(federation, 2):
        document = decode(request.content, TrainRequest)
        assert (document.round, document.run_id, document.plan) == (2, "1", federation.plan)
        assert len(document.held[0]) == 3
        tensors = received(request, federation)
        assert set(tensors) == set(parameters.select(now, document.held))
        assert len(tensors) < len(now)
        assert all(torch.equal(t, now[n]) for n, t in tensors.items())
        assert request.metadata.group_id == "2"


def test_requests_follow_the_seed_and_the_round():
    def parts(seed, round_number):
        requests = ask(SmallFederation(nodes=4, seed=seed), round_number)
        return [(r.metadata.dst_node_id, held_of(r)[0]) for r in requests]

    assert parts(1, 1) == parts(1, 1)
    assert len({tuple(sorted(parts(s, r))) for s, r in [(1, 1), (1, 2), (2, 1)]}) == 3


def test_a_small_node_gets_what_it_can_hold():
    federation = SmallFederation(nodes=2)
    federation.nodes = {11: describe(1, expert_capacity=2), 12: describe(2)}
    sizes = {r.metadata.dst_node_id: len(held_of(r)[0]) for r in ask(federation)}
    assert sizes == {11: 2, 12: 3}


def test_a_model_in_bfloat16_travels_rounded_and_stays_as_it_is():
    federation = SmallFederation(nodes=2, plan=make_plan(traffic={"model": "bf16"}))
    before = federation.values()
    for request in ask(federation):
        shapes = parameters.shapes(federation.plan.model, held_of(request))
        arrived = tensors_of(request.content, shapes, encodings_of("bf16", shapes))
        assert all(torch.equal(tensor, before[name].bfloat16().float()) for name, tensor in arrived.items())
        assert not all(torch.equal(tensor, before[name]) for name, tensor in arrived.items())
    assert all(torch.equal(tensor, before[name]) for name, tensor in federation.values().items())
