"""Bytes on the wire against a walk over Flower's objects."""

from __future__ import annotations

import hashlib

import numpy as np
import pytest
import torch
from conftest import make_config
from flwr.app import Array, ArrayRecord, ConfigRecord, MetricRecord, RecordDict
from server_samples import SmallFederation, ask, delta_for, describe, make_plan, train_reply

from conclave.protocol.codec import encode
from conclave.protocol.tensor_array import pack
from conclave.server.rounds.ask import full_exchange_bytes
from conclave.server.rounds.traffic import exchange_bytes, wire_bytes


def objects(item) -> dict[str, bytes]:
    """Every object below ``item`` by the hash of its content: equal ones are stored, and sent, once."""
    content = item.deflate()
    found = {hashlib.sha256(content).hexdigest(): content}
    for child in (item.children or {}).values():
        found |= objects(child)
    return found


@pytest.mark.parametrize(
    "content",
    [
        RecordDict(),
        encode(describe(1)),
        encode(describe(1), pack({"a": torch.arange(100.0)})),
        RecordDict(
            {"a": ArrayRecord({"x": Array(np.ones(7)), "y": Array(np.zeros((3, 5)))}), "m": MetricRecord({"k": 1})}
        ),
    ],
)
def test_wire_bytes_are_the_sum_of_the_deflated_objects(content):
    assert wire_bytes(content) == sum(map(len, objects(content).values()))


def test_a_request_counts_all_its_objects():
    for request in ask(SmallFederation(nodes=2)):
        assert wire_bytes(request) == sum(map(len, objects(request).values()))
        assert wire_bytes(request.content) == sum(map(len, objects(request.content).values()))


def test_bytes_grow_with_the_tensors():
    sizes = [wire_bytes(encode(describe(1), pack({"a": torch.rand(n)}))) for n in (10, 1000, 100_000)]
    assert 4 * 990 <= sizes[1] - sizes[0] <= 4 * 990 + 64  # 64: longer numbers in headers
    assert 4 * 99_000 <= sizes[2] - sizes[1] <= 4 * 99_000 + 64


def test_equal_objects_are_sent_once():
    def record(*values):
        return RecordDict({f"r{i}": ArrayRecord({"x": Array(np.full(10_000, v))}) for i, v in enumerate(values)})

    one, twice, two = (wire_bytes(record(*values)) for values in ((1.0,), (1.0, 1.0), (1.0, 2.0)))
    assert twice - one < 1_000
    assert two - one > 80_000


def test_a_longer_document_costs_its_length():
    sizes = [wire_bytes(RecordDict({"document": ConfigRecord({"json": "x" * n})})) for n in (100, 5100)]
    assert 5000 <= sizes[1] - sizes[0] <= 5016


def test_the_quick_count_is_the_exact_one():
    contents = [encode(describe(n, declared_size=10**n), pack({"a" * n: torch.rand(17 * n)})) for n in (1, 2, 3, 3)]
    for content in [*contents, encode(describe(1)), *(request.content for request in ask(SmallFederation(nodes=3)))]:
        assert exchange_bytes(content) == wire_bytes(content)


def test_bytes_are_counted_both_ways():
    small, large = (SmallFederation(nodes=2, plan=make_plan(model=make_config(hidden=h))) for h in (8, 64))
    outcomes = []
    for federation in (small, large):
        requests = ask(federation)
        outcome = federation.answer(1, [train_reply(r, delta_for(r, federation)) for r in requests])
        floats = sum(t.numel() for r in requests for t in delta_for(r, federation).values())
        # float32 payload, and per message at most 12 KiB of names, plan and Flower's object headers
        for count in (outcome.bytes_down, outcome.replies.bytes_up):
            assert 4 * floats < count < 4 * floats + 2 * 12_288
        assert 4 * sum(t.numel() for t in federation.values().values()) * 2 < full_exchange_bytes(
            federation.terms, federation.model.tensors
        )
        outcomes.append(outcome)
    assert outcomes[0].bytes_down < outcomes[1].bytes_down
    assert outcomes[0].replies.bytes_up < outcomes[1].replies.bytes_up
