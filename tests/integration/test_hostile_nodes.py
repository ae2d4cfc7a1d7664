"""Digits with one hostile node of every kind: the model is bit for bit that of a run in which they had refused."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from safetensors.torch import load, save

import conclave.simulations.client_app
from conclave.protocol.codec import body_of, decode, encode
from conclave.protocol.messages import TRAIN, Refusal, TrainReply, TrainRequest
from conclave.server.run import run_scenario
from conclave.server.run_directory import RunDirectory
from conclave.server.scenario import read_scenario
from conclave.simulations.engines.inline import InlineGrid
from conclave.simulations.shipped import find
from conclave.simulations.simulate import run_number

ROUNDS = 3


def change(content, spoil):
    """Put other tensors into a reply."""
    return encode(decode(content, TrainReply), save(spoil(load(body_of(content)))))


def at(tensors, group, value):
    name = next(n for n in sorted(tensors) if n.startswith(group))
    return tensors | {name: value(tensors[name])}


class Hostile:
    """The ClientApp of ten nodes, of which number 0 to 8 do what their kind does to honest replies.

    refusing: they refuse instead, as far as they would be dropped.
    """

    def __init__(self, refusing):
        self.refusing = refusing
        self.first = {}

    def __call__(self, message, context):
        reply = conclave.simulations.client_app.app(message, context)
        number = context.node_config["partition-id"]
        if message.metadata.message_type != TRAIN or number >= len(self.KINDS):
            return reply
        request = decode(message.content, TrainRequest)
        if number not in self.first:
            self.first[number] = reply.content
            if self.KINDS[number][0] is Hostile.replays:
                return reply  # honest until there is something to replay
        if self.refusing:
            reply.content = encode(Refusal(code="not-allowed"))
        else:
            reply.content = self.KINDS[number][0](self, number, request, reply.content)
        return reply

    def sends_nan(self, number, request, content):
        return change(content, lambda d: at(d, "shared/", lambda t: t * float("nan")))

    def sends_infinity(self, number, request, content):
        return change(content, lambda d: at(d, "router/", lambda t: t / 0.0))

    def sends_another_shape(self, number, request, content):
        return change(content, lambda d: at(d, "expert/", lambda t: t.flatten()))

    def sends_an_unassigned_expert(self, number, request, content):
        mine = request.held[0]
        other = next(e for e in range(8) if e not in mine)
        return change(content, lambda d: {n.replace(f"/0/{mine[0]}/", f"/0/{other}/"): t for n, t in d.items()})

    def leaves_a_tensor_out(self, number, request, content):
        return change(content, lambda d: {n: t for n, t in d.items() if n != sorted(d)[0]})

    def goes_over_the_norm(self, number, request, content):
        return change(content, lambda d: {n: 1e4 * t for n, t in d.items()})

    def sends_garbage(self, number, request, content):
        return encode(decode(content, TrainReply), bytes(range(256)) * 8)

    def replays(self, number, request, content):
        return self.first[number]

    def answers_for_another_run(self, number, request, content):
        other = decode(content, TrainReply)
        return encode(other.model_copy(update={"charge_id": "7" * 64}), body_of(content))

    KINDS = (
        (sends_nan, "not-finite"),
        (sends_infinity, "not-finite"),
        (sends_another_shape, "wrong-shape"),
        (sends_an_unassigned_expert, "other-tensors"),
        (leaves_a_tensor_out, "other-tensors"),
        (goes_over_the_norm, "over-norm"),
        (sends_garbage, "undecodable"),
        (replays, "replay"),
        (answers_for_another_run, "wrong-charge"),
    )


class Doubling(InlineGrid):
    """Delivers every reply twice."""

    def send_and_receive(self, messages, *, timeout=None):
        for reply in super().send_and_receive(messages, timeout=timeout):
            yield reply
            if reply.metadata.message_type == TRAIN:
                yield reply


def run(folder, client, grid=InlineGrid, **changes):
    changes = {"federation.rounds": ROUNDS, "federation.optimizer.momentum": 0.5} | changes
    scenario = read_scenario(find("digits"), changes)
    directory = RunDirectory(folder) if folder.exists() else RunDirectory.create(scenario, folder)
    number = run_number(scenario)
    config = {"scenario": scenario.to_toml(), "run-dir": str(directory.path)}
    net = grid(client, scenario.partition.nodes, number, config, lambda reply: None)
    run_scenario(net, scenario, directory, str(number))
    return directory


def model_of(directory):
    return load((directory.path / "model" / "model.safetensors").read_bytes())


def test_hostile_nodes_do_exactly_what_refusing_ones_do(tmp_path):
    hostile = run(tmp_path / "hostile", Hostile(refusing=False))
    refusing = run(tmp_path / "refusing", Hostile(refusing=True))
    for name, tensor in model_of(refusing).items():
        assert torch.equal(tensor, model_of(hostile)[name]), name
    expected = Counter(reason for _, reason in Hostile.KINDS)
    first = expected - Counter(["replay"])
    assert [line["dropped_by"] for line in hostile.metrics()] == [first, expected, expected]
    assert [line["accepted"] for line in hostile.metrics()] == [2, 1, 1]
    assert [line["loss"] for line in hostile.metrics()] == [line["loss"] for line in refusing.metrics()]


def test_replies_that_come_twice_count_once(tmp_path):
    once, twice = (
        run(tmp_path / "once", conclave.simulations.client_app.app),
        run(tmp_path / "twice", conclave.simulations.client_app.app, Doubling),
    )
    assert all(torch.equal(tensor, model_of(twice)[name]) for name, tensor in model_of(once).items())
    assert [line["dropped_by"] for line in twice.metrics()] == [{"duplicate": 10}] * ROUNDS
    assert [line["accepted"] for line in twice.metrics()] == [10] * ROUNDS


class SameNoise:
    """The ClientApp of ten nodes, of which number 3 repeats its first delta for what it was asked for before.

    unplugged: the round that ends with an exception.
    """

    def __init__(self, unplugged=None):
        self.unplugged = unplugged
        self.sent = {}

    def __call__(self, message, context):
        reply = conclave.simulations.client_app.app(message, context)
        if message.metadata.message_type == TRAIN and context.node_config["partition-id"] == 3:
            if decode(message.content, TrainRequest).round == self.unplugged:
                self.unplugged = None
                raise ConnectionError
            mine = load(body_of(reply.content))
            self.sent = mine | self.sent
            reply.content = change(reply.content, lambda d: {name: self.sent[name] for name in d})
        return reply


def test_noise_that_was_sent_before_is_known_again_also_after_a_restart(tmp_path):
    test = {"federation.noise_test": {}, "privacy.epsilon": 0.5}  # three rounds of 8 leave little noise
    whole = run(tmp_path / "whole", SameNoise(), **test)
    assert [line["dropped_by"] for line in whole.metrics()] == [{}] + [{"not-noise-like": 1}] * (ROUNDS - 1)
    client = SameNoise(unplugged=2)
    with pytest.raises(ConnectionError):
        run(tmp_path / "parted", client, **test)
    parted = run(tmp_path / "parted", client, **test)
    assert [line["dropped_by"] for line in parted.metrics()] == [line["dropped_by"] for line in whole.metrics()]
    assert all(torch.equal(tensor, model_of(parted)[name]) for name, tensor in model_of(whole).items())


def test_without_the_noise_test_the_same_lies_are_taken(tmp_path):
    taken = run(tmp_path / "taken", SameNoise(), **{"privacy.epsilon": 0.5})
    assert [line["dropped_by"] for line in taken.metrics()] == [{}] * ROUNDS
