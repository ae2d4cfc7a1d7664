"""The same message again while it is being answered, and messages that race for the last of a budget."""

from __future__ import annotations

import fcntl
import os
import signal
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from unittest import mock

import pytest
from mortal_node import (
    Child,
    answer,
    answer_of,
    asked,
    begin,
    charge_id_of,
    create_node,
    deliver,
    expected,
    message,
    off_the_wire,
    on_the_wire,
    open_node,
    remains,
    weights,
    witness_of,
)
from node_samples import HELD
from plan_samples import plan

import conclave.clients.node
from conclave.clients.trainer import train
from conclave.model import parameters
from conclave.privacy.accounting.mechanisms import SampledGaussian
from conclave.privacy.accounting.prices import charge_units
from conclave.privacy.ledger.reading.history import LedgerFile
from conclave.privacy.ledger.reading.verification import audit_history
from conclave.protocol.codec import unpack
from conclave.protocol.messages import AdmitRequest, ProtocolError
from conclave.protocol.tensor_array import pack

WORKERS = 8


@pytest.fixture
def folder(tmp_path):
    create_node(tmp_path)
    return tmp_path


@contextmanager
def told_of_waiting(waiting):
    """Say so when a lock is found held, then wait for it."""
    flock = fcntl.flock

    def noticing(lock, operation):
        try:
            flock(lock, operation | fcntl.LOCK_NB)
        except BlockingIOError:
            waiting()
            flock(lock, operation)

    with mock.patch("fcntl.flock", noticing):
        yield


def patch_waiting(tell):
    return told_of_waiting(lambda: tell("waiting", ""))


def patch_held_in_training(go):
    """Train only once the test says so."""

    def patch(tell):
        at_once = conclave.clients.node.train

        def held(*arguments, **options):
            tell("in training", "")
            os.read(go, 1)
            return at_once(*arguments, **options)

        return mock.patch.object(conclave.clients.node, "train", held)

    return patch


def charge(folder):
    ledger_id = LedgerFile(folder / "ledger.db").genesis.ledger_id
    return remains(folder, asked(), charge_id_of(asked(), ledger_id))


def audit(folder):
    found = audit_history(LedgerFile(folder / "ledger.db"), witness=witness_of(folder).read())
    assert found.findings == []
    return found


@pytest.fixture
def two_processes(folder):
    """A process that answers a message, held in training, and a second one that was given it too and waits."""
    go, start = os.pipe()
    first = begin(folder, message(asked()), patch=patch_held_in_training(go))
    try:
        assert [first.hear(), first.hear()] == ["drawn", "in training"]
        second = begin(folder, message(asked()), patch=patch_waiting)
        assert second.hear() == "waiting"
        assert charge(folder).attempts == 1
        yield first, second, start
    finally:
        os.write(start, b"x")


def test_a_redelivery_to_another_process_waits_and_gets_the_same(two_processes, folder):
    first, second, start = two_processes
    secret = charge(folder).secret
    os.write(start, b"x")
    lives = [first.end(), second.end()]
    assert lives[0].sent == lives[1].sent
    assert answer_of(lives[0].sent)[1] == expected(asked(), secret, None).body
    assert lives[0].told["trained"] == [secret.hex()]
    assert "trained" not in lives[1].told
    assert charge(folder).states == ["RESERVED", "COMMITTED"]
    assert audit(folder).charges == 1


def test_where_the_first_process_dies_the_waiting_one_goes_on_with_its_secret(two_processes, folder):
    first, second, _ = two_processes
    secret = charge(folder).secret
    os.kill(first.pid, signal.SIGKILL)
    assert first.end().sent == b""
    life = second.end()
    assert answer_of(life.sent)[1] == expected(asked(), secret, None).body
    assert life.told["trained"] == [secret.hex()] != life.told["drawn"]
    assert charge(folder).states == ["RESERVED", "COMMITTED"]
    assert audit(folder).charges == 1


def test_a_redelivery_to_another_thread_waits_and_gets_the_same(folder, monkeypatch):
    node, content = open_node(folder), off_the_wire(message(asked()))
    in_training, waiting, go = threading.Event(), threading.Event(), threading.Event()
    secrets = []

    def held(*arguments, **options):
        secrets.append(arguments[5])
        in_training.set()
        assert go.wait(60)
        return train(*arguments, **options)

    monkeypatch.setattr(conclave.clients.node, "train", held)
    with told_of_waiting(waiting.set), ThreadPoolExecutor(2) as pool:
        try:
            first = pool.submit(node.train, asked(), content)
            assert in_training.wait(60)
            second = pool.submit(node.train, asked(), content)
            assert waiting.wait(60)
            assert charge(folder).attempts == 1
        finally:
            go.set()
        sent = [on_the_wire(answer.result()) for answer in (first, second)]
    node.ledger.close()
    assert sent[0] == sent[1]
    assert len(secrets) == 1
    assert answer_of(sent[0])[1] == expected(asked(), secrets[0], None).body
    assert charge(folder).states == ["RESERVED", "COMMITTED"]
    assert audit(folder).charges == 1


def race(folder, messages) -> list[bytes]:
    """Give each message to a process of its own, all at once; return what they send."""
    go, start = os.pipe()

    def work(data):
        def live(send, tell):
            node = open_node(folder)
            tell("ready", "")
            os.read(go, 1)
            send(answer(folder, data, node))

        return live

    children = [Child(work(data)) for data in messages]
    assert [child.hear() for child in children] == ["ready"] * len(messages)
    os.write(start, b"x" * len(messages))
    return [child.end().sent for child in children]


def outcome(sent: bytes) -> str:
    try:
        answer_of(sent)
    except ProtocolError as error:
        return error.code
    return "answered"


ONE_ROUND = plan(rounds=1, privacy={"epsilon": 8.0, "delta": 1e-5, "clip": 1.0, "sampling_rate": 0.5})
MECHANISM = SampledGaussian(sampling_rate=0.5, noise_multiplier=2.0, steps=1)


@pytest.fixture
def almost_spent(tmp_path):
    """A node whose budget pays for one more charge, and not for two."""
    create_node(tmp_path, epsilon=3.0)
    genesis = LedgerFile(tmp_path / "ledger.db").genesis
    affordable = int(genesis.rdp_budget) // charge_units(MECHANISM, float(genesis.order))
    assert affordable > 1
    for number in range(1, affordable):
        answer_of(deliver(tmp_path, message(asked(plan=ONE_ROUND, run_id=f"earlier-{number}"))).sent)
    return tmp_path, affordable


def test_of_runs_that_race_for_the_last_of_the_budget_one_is_admitted(almost_spent):
    folder, affordable = almost_spent
    sent = race(folder, [message(asked(plan=ONE_ROUND, run_id=str(number))) for number in range(WORKERS)])
    assert sorted(map(outcome, sent)) == ["answered"] + ["budget-exhausted"] * (WORKERS - 1)
    found = audit(folder)
    assert (found.charges, found.committed) == (affordable, affordable)


def test_of_messages_that_race_for_one_round_one_is_charged(folder):
    """There is budget for all, and eight rounds were admitted: the round is one all the same."""
    tensors = unpack(weights(), parameters.shapes(asked().plan.model, HELD))
    bodies = [pack({name: tensor + number for name, tensor in tensors.items()}) for number in range(WORKERS)]
    sent = race(folder, [message(asked(), body) for body in bodies])
    assert sorted(map(outcome, sent)) == ["already-charged"] * (WORKERS - 1) + ["answered"]
    found = audit(folder)
    assert (found.charges, found.committed) == (1, 1)


def test_of_messages_that_race_for_what_a_plan_set_aside_one_is_charged(almost_spent):
    """One round was admitted. Eight crafted messages, with other weights each, would be eight charges."""
    folder, affordable = almost_spent
    node = open_node(folder)
    node.admit(AdmitRequest(run_id="last", scenario="test", plan=ONE_ROUND))
    node.ledger.close()
    tensors = unpack(weights(), parameters.shapes(ONE_ROUND.model, HELD))
    bodies = [pack({name: tensor + number for name, tensor in tensors.items()}) for number in range(WORKERS)]
    sent = race(folder, [message(asked(plan=ONE_ROUND, run_id="last"), body) for body in bodies])
    assert sorted(map(outcome, sent)) == ["already-charged"] * (WORKERS - 1) + ["answered"]
    found = audit(folder)
    assert (found.charges, found.committed) == (affordable, affordable)
