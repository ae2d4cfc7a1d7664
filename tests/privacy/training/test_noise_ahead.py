"""Noise drawn beside the gradient: the same bits as noise drawn after it, and no thread that outlives its step."""

from __future__ import annotations

import os
import threading
from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import make_batch, make_config

import conclave.privacy.training.noise_ahead
import conclave.privacy.training.unit_optimizer
from conclave.model.building import build
from conclave.privacy.gradients.unit_index import UnitIndex
from conclave.privacy.randomness import BLOCK, derive, fill_normal, standard_normal
from conclave.privacy.training.dpsgd_mechanism import DpSgd
from conclave.privacy.training.noise_ahead import NoiseAhead, keep_to_one_core, worth_a_thread
from conclave.privacy.training.private_training import PrivateTraining

SECRET = derive(bytes(32), "noise ahead")
LENGTHS = [3, 70 * BLOCK + 5, 0, BLOCK]
WANTED = [(derive(SECRET, number), count) for number, count in enumerate(LENGTHS)]
PLENTY = 1 << 30
MECHANISM = DpSgd(
    steps=1, learning_rate=0.1, sampling_rate=0.8, clip=0.5, noise_multiplier=1.0, declared_size=8, physical_batch=3
)


def unscaled(values):
    pass


def noise_threads():
    return [thread for thread in threading.enumerate() if thread.name == "noise"]


def drawn_ahead(monkeypatch, always):
    monkeypatch.setattr(conclave.privacy.training.unit_optimizer, "worth_a_thread", lambda values: always)


def test_blocks_from_the_middle_are_those_of_the_whole():
    whole = standard_normal(SECRET, 9 * BLOCK).numpy()
    for first, blocks in ((0, 9), (1, 1), (3, 6), (8, 1)):
        part = np.empty(blocks * BLOCK)
        fill_normal(SECRET, part, first)
        assert np.array_equal(part, whole[first * BLOCK : (first + blocks) * BLOCK])


def test_values_are_those_of_the_secrets():
    with NoiseAhead(WANTED, PLENTY, unscaled) as ahead:
        assert len(ahead) == len(WANTED)
        for number, (secret, count) in enumerate(WANTED):
            assert torch.equal(ahead.take(number), standard_normal(secret, count))


def test_every_value_is_scaled_once():
    def doubled(values):
        values *= 2.0

    with NoiseAhead(WANTED, PLENTY, doubled) as ahead:
        assert torch.equal(ahead.take(1), 2.0 * standard_normal(*WANTED[1]))


def test_noise_is_taken_once():
    with NoiseAhead(WANTED, PLENTY, unscaled) as ahead:
        ahead.take(1)
        with pytest.raises(RuntimeError, match="once"):
            ahead.take(1)


def test_tensors_that_need_too_much_memory_are_left_out():
    room = 8 * (BLOCK + 71 * BLOCK)
    for most, fitting in ((0, 0), (8 * BLOCK, 1), (room - 1, 1), (room, 3), (room + 8 * BLOCK, 4)):
        with NoiseAhead(WANTED, most, unscaled) as ahead:
            assert len(ahead) == fitting


def test_a_thread_ends_with_the_context_whatever_was_drawn():
    with NoiseAhead([(SECRET, 2000 * BLOCK)], PLENTY, unscaled):
        pass
    assert not noise_threads()


def test_what_fails_in_the_thread_is_raised_where_the_noise_is_wanted(monkeypatch):
    here, failed = threading.current_thread(), threading.Event()

    def failing(secret, values, first_block=0):
        if threading.current_thread() is not here:
            failed.set()
            raise MemoryError("beside")
        failed.wait(10)

    monkeypatch.setattr(conclave.privacy.training.noise_ahead, "fill_normal", failing)
    with NoiseAhead([(SECRET, 500 * BLOCK)], PLENTY, unscaled) as ahead, pytest.raises(MemoryError, match="beside"):
        ahead.take(0)


@pytest.mark.parametrize(
    "options",
    [{}, {"numeric": "strict"}, {"clipping": "adaptive"}, {"memory_bytes": 8 * 4096 * 12}, {"load_share": 0.1}],
    ids=["fast", "strict", "adaptive", "little memory", "loads"],
)
def test_steps_are_the_same_to_the_last_bit(monkeypatch, options):
    results, begun = [], []

    class Counted(NoiseAhead):
        def __init__(self, *args):
            super().__init__(*args)
            begun.append(len(self))

    monkeypatch.setattr(conclave.privacy.training.unit_optimizer, "NoiseAhead", Counted)
    for ahead in (False, True):
        drawn_ahead(monkeypatch, ahead)
        network = build(make_config(), seed=3)
        optimizer = torch.optim.SGD(network.parameters(), lr=0.1)
        with PrivateTraining(network, optimizer, network.loss, replace(MECHANISM, **options), SECRET) as training:
            for _ in range(3):
                training.step(make_batch(8))
        results.append([p.detach().clone() for p in network.parameters()] + list(training.loads.values()))
    assert len(begun) == 3
    assert min(begun) > 0
    assert all(torch.equal(*pair) for pair in zip(*results, strict=True))


def test_gradients_are_sum_and_noise_in_double_precision(monkeypatch):
    """In chunks or not: the value of every coordinate, rounded once."""
    monkeypatch.setattr(conclave.privacy.training.unit_optimizer, "_CHUNK", 7)
    network = build(make_config(), seed=3)
    optimizer = torch.optim.SGD(network.parameters(), lr=0.1)
    with PrivateTraining(network, optimizer, network.loss, MECHANISM, SECRET) as training:
        chosen = training.sample(8)
        index = UnitIndex(8)
        sums = training.sums_without_noise(make_batch(8), index, chosen)
        got = training.noised_gradients(make_batch(8), index)
    for number, (total, gradient) in enumerate(zip(sums, got, strict=True)):
        noise = standard_normal(derive(derive(SECRET, "noise", 0), number), total.numel()).view_as(total)
        assert torch.equal(gradient, ((noise * 0.5 + total) * (1.0 / 6.4)).float())


def test_an_interrupted_step_leaves_no_thread(monkeypatch):
    drawn_ahead(monkeypatch, True)
    network = build(make_config(), seed=3)

    def interrupted(batch):
        assert noise_threads()
        raise KeyboardInterrupt

    optimizer = torch.optim.SGD(network.parameters(), lr=0.1)
    monkeypatch.setattr(conclave.privacy.training.noise_ahead, "fill_normal", lambda *_: threading.Event().wait(0.01))
    with PrivateTraining(network, optimizer, interrupted, MECHANISM, SECRET) as training:
        with pytest.raises(KeyboardInterrupt):
            training.step(make_batch(8))
        assert not noise_threads()


def test_where_no_thread_can_be_started_the_caller_draws(monkeypatch):
    def refused(thread):
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(threading.Thread, "start", refused)
    with NoiseAhead(WANTED, PLENTY, unscaled) as ahead:
        assert torch.equal(ahead.take(1), standard_normal(*WANTED[1]))


def test_a_second_thread_needs_a_core_of_its_own_and_enough_to_do(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1}, raising=False)
    assert torch.get_num_threads() == 1
    assert worth_a_thread(1_000_000)
    assert not worth_a_thread(1_000)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0})
    assert not worth_a_thread(1_000_000)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1})
    monkeypatch.setattr(conclave.privacy.training.noise_ahead, "_one_core", False)
    keep_to_one_core()
    assert not worth_a_thread(1_000_000)
