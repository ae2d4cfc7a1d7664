"""A node that is killed while it measures: charged once, released once, and with one draw of noise only."""

from __future__ import annotations

import random
from dataclasses import replace
from pathlib import Path

import pytest
from conftest import make_batch
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from evaluation_samples import ASIDE_KEY, ask, held_out_batch
from ledger_samples import KEY, MACHINE, genesis
from mortal_node import Child, Kill, Life, calls, lines, scratch_copy, steps_of

from conclave.clients.node import Node
from conclave.clients.node_ledger import HeldOut
from conclave.clients.policy import Policy
from conclave.data.values.schema import ImageSchema
from conclave.privacy.ledger import Ledger
from conclave.privacy.ledger.heads import public_hex
from conclave.privacy.ledger.reading.history import LedgerFile
from conclave.privacy.ledger.reading.verification import audit_history
from conclave.privacy.ledger.witness import Witness
from conclave.privacy.randomness import fresh_secret
from conclave.protocol.messages import ProtocolError

KILLS, SOAK_KILLS = 8, 104


def witness_of(folder: Path, side: str) -> Witness:
    return Witness(folder / "elsewhere" / side)


def create(folder: Path) -> None:
    training = replace(genesis(mode="deployment"), held_out="0.4")
    for side, document, key in (
        ("ledger", training, KEY),
        ("held-out", training.for_held_out(public_hex(ASIDE_KEY)), ASIDE_KEY),
    ):
        Ledger.create(folder / f"{side}.db", document, key, witness=witness_of(folder, side)).close()


def open_node(folder: Path) -> Node:
    def opened(side: str, key: Ed25519PrivateKey) -> Ledger:
        return Ledger(folder / f"{side}.db", key, witness=witness_of(folder, side), machine=MACHINE)

    return Node(
        records=make_batch(40),
        schema=ImageSchema(image=(1, 8, 8), classes=5),
        declared_size=40,
        policy=Policy(releases={"delta": 1.0, "metrics": 1.0}),
        ledger=opened("ledger", KEY),
        new_secret=lambda _: fresh_secret(),
        held_out=HeldOut(held_out_batch(), opened("held-out", ASIDE_KEY)),
    )


def measure(folder: Path) -> bytes:
    """Answer the question; what is sent is a code or the released bytes."""
    try:
        return ask(open_node(folder))[1]
    except ProtocolError as error:
        return error.code.encode()


def deliver(folder: Path, kill: Kill | None = None) -> Life:
    def live(send, tell) -> None:
        if kill is not None:
            kill.arm(tell)
        send(measure(folder))

    return Child(live).end()


def check(folder: Path) -> list[str]:
    """Return the states of the one charge; the books hold and the witness follows after a restart."""
    with scratch_copy(folder) as scratch:
        open_node(scratch)
        found = audit_history(LedgerFile(scratch / "held-out.db"), witness=witness_of(scratch, "held-out").read())
        assert found.findings == []
        assert LedgerFile(scratch / "ledger.db").head.seq == 0  # the units that train pay nothing
        entries = open_node(scratch).held_out.ledger.entries()
    assert len({entry.charge_id for entry in entries if entry.state == "RESERVED"}) <= 1
    return [entry.state for entry in entries if entry.state != "ADMITTED"]


@pytest.fixture(scope="module")
def steps(tmp_path_factory):
    folder = tmp_path_factory.mktemp("steps")
    create(folder)
    with scratch_copy(folder) as scratch:
        measure(scratch)  # caches fill up
    found = {}
    for tracer in (lines, calls):
        with scratch_copy(folder) as scratch:
            found[tracer] = steps_of(tracer, lambda scratch=scratch: measure(scratch))
    return found


def kill_at_random(folder: Path, steps, seed: int) -> None:
    create(folder)
    generator = random.Random(seed)
    tracer, sent = (lines, calls)[seed % 2], set[bytes]()
    for _ in range(generator.choice((1, 1, 2, 3))):
        life = deliver(folder, Kill(generator.randrange(1, len(steps[tracer]) + 1), tracer))
        states = check(folder)
        assert states in ([], ["RESERVED"], ["RESERVED", "COMMITTED"], ["RESERVED", "ABANDONED"])
        sent |= {life.sent} - {b""}
        assert not life.sent or "COMMITTED" in states or "ABANDONED" in states
    last, again = deliver(folder), deliver(folder)
    states = check(folder)
    assert {last.sent, again.sent} | sent == {last.sent}  # noise is drawn once, from the operating system
    assert states in (["RESERVED", "COMMITTED"], ["RESERVED", "ABANDONED"])
    assert (last.sent == b"charge-abandoned") == (states == ["RESERVED", "ABANDONED"])


@pytest.mark.parametrize("seed", range(KILLS))
def test_a_node_killed_while_it_measures_charges_once_and_releases_once(tmp_path, steps, seed):
    kill_at_random(tmp_path, steps, seed)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(KILLS, KILLS + SOAK_KILLS))
def test_the_same_at_many_more_moments(tmp_path, steps, seed):
    kill_at_random(tmp_path, steps, seed)
