"""A deployed node that is killed at any step: nothing leaves without a charge, and nothing twice.

Between receiving a message and having sent the reply, a process may die before any line of the code that decides, or
at any call below it. What it left is examined on a copy, then the message is delivered again.
"""

from __future__ import annotations

import copy
import inspect
import os
import random
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from unittest import mock

import pytest
from mortal_node import (
    Child,
    Expected,
    Kill,
    Life,
    Remains,
    Step,
    Tracer,
    answer,
    answer_of,
    asked,
    calls,
    charge_id_of,
    create_node,
    deliver,
    entering,
    expected,
    lines,
    message,
    on_the_wire,
    open_node,
    remains,
    scratch_copy,
    steps_of,
    transmit,
    witness_of,
)

import conclave.clients.trainer
from conclave.base.canonical import sha256
from conclave.privacy.accounting.prices import charge_units
from conclave.privacy.ledger import Ledger
from conclave.privacy.ledger.database import transaction
from conclave.privacy.ledger.reading.history import LedgerFile
from conclave.privacy.ledger.reading.verification import LedgerAudit, audit_history
from conclave.privacy.ledger.store import Store
from conclave.protocol.messages import ProtocolError

KILLS, SOAK_KILLS = 12, 208
IN_TRAINING = Kill(1, entering(conclave.clients.trainer.train.__code__))
BEFORE_SENDING = Kill(1, entering(on_the_wire.__code__))
EARLIER = {
    "never": [],
    "in training": [IN_TRAINING],
    "twice in training": [IN_TRAINING, IN_TRAINING],
    "before sending": [BEFORE_SENDING],
}
"""How a node died before, when the same message was delivered: what a line decides depends on it."""


def audit(folder: Path) -> LedgerAudit:
    found = audit_history(LedgerFile(folder / "ledger.db"), witness=witness_of(folder).read())
    assert found.findings == []
    return found


def code_of(sent: bytes) -> str:
    with pytest.raises(ProtocolError) as caught:
        answer_of(sent)
    return caught.value.code


@dataclass
class Trial:
    """One message, delivered as often as it takes, and what must hold after each delivery."""

    folder: Path
    round: int = 1
    lives: list[Life] = field(default_factory=list)
    first_secret: bytes | None = None
    due: Expected | None = None

    def __post_init__(self):
        create_node(self.folder)
        for number in range(1, self.round):
            assert not deliver(self.folder, message(asked(round=number))).killed
        self.request = asked(round=self.round)
        self.data = message(self.request)
        self.genesis = LedgerFile(self.folder / "ledger.db").genesis
        self.charge_id = charge_id_of(self.request, self.genesis.ledger_id)
        self.before = self.now()
        self.spent_before = audit(self.folder).epsilon

    def copied(self, folder: Path) -> Trial:
        """Return a trial that goes on from here in another folder."""
        shutil.copytree(self.folder, folder)
        other = copy.copy(self)
        other.folder, other.lives = folder, list(self.lives)
        return other

    def now(self) -> Remains:
        return remains(self.folder, self.request, self.charge_id)

    def deliver(self, kill: Kill | None = None, **options) -> Life:
        life = deliver(self.folder, self.data, kill, **options)
        self.lives.append(life)
        self.check()
        return life

    @property
    def replies(self) -> list[bytes]:
        """Everything that was ever sent, refusals aside."""
        return [life.sent for life in self.lives if life.sent and b"charge-abandoned" not in life.sent]

    @property
    def trained(self) -> list[str]:
        return [secret for life in self.lives for secret in life.told.get("trained", [])]

    def check(self) -> None:
        """What must hold whenever a process has ended, however it ended."""
        left = self.now()
        assert left.states in ([], ["RESERVED"], ["RESERVED", "COMMITTED"], ["RESERVED", "ABANDONED"])
        if self.first_secret is None and left.states:
            # The secret of the charge is the one that was drawn in the process that reserved it.
            self.first_secret = bytes.fromhex(self.lives[-1].told["drawn"][-1])
            self.due = expected(self.request, self.first_secret, self.before.clip)
        self.check_books(left)
        self.check_release(left)
        self.check_restart()

    def check_books(self, left: Remains) -> None:
        """The charge exists once, has the price, and the secret is there exactly while it may be needed."""
        if not left.states:
            assert (left.secret, self.trained, self.replies) == (None, [], [])
            return
        reserved = left.entry(self.charge_id, "RESERVED")
        price = charge_units(reserved.mechanism, float(self.genesis.order))
        assert int(reserved.rdp_charge) == price > 0
        assert int(left.entries[-1].rdp_total) == price * self.round
        assert set(self.trained) <= {self.first_secret.hex()}
        assert len(self.trained) <= left.attempts or left.states[1:]
        assert len(self.trained) <= 2
        if left.states == ["RESERVED"]:
            assert left.secret == self.first_secret
            assert left.attempts in (1, 2)
        else:
            assert left.secret is None

    def check_release(self, left: Remains) -> None:
        """Nothing was sent but the committed output of the first secret; local state switched with it."""
        committed = "COMMITTED" in left.states
        assert (left.clip, left.reply) == ((self.due.clip, self.due.body) if committed else (self.before.clip, None))
        for sent in self.replies:
            assert committed
            reply, released = answer_of(sent)
            entry = left.entry(self.charge_id, "COMMITTED")
            assert released == self.due.body
            assert entry.output_hash == sha256(released)
            assert (reply.charge_id, reply.receipt.seq, reply.receipt.hash) == (self.charge_id, entry.seq, entry.hash)
        assert len(set(self.replies)) <= 1

    def check_restart(self) -> None:
        """A restart finds everything, the witness is not ahead, and the history holds."""
        with scratch_copy(self.folder) as scratch:
            node = open_node(scratch)
            assert [entry.line for entry in node.ledger.entries()] == [entry.line for entry in self.now().entries]
            assert witness_of(scratch).read() == node.ledger.head
            node.ledger.close()
            audit(scratch)

    def finish(self) -> None:
        """Deliver undisturbed, and once more."""
        left = self.now()
        ended = left.states[1:] == ["ABANDONED"] or left.attempts == 2
        last = self.deliver()
        assert not last.killed
        if ended:
            assert code_of(last.sent) == "charge-abandoned"
            assert self.now().states == ["RESERVED", "ABANDONED"]
        else:
            answer_of(last.sent)
            assert self.now().states == ["RESERVED", "COMMITTED"]
        assert secret_is_gone(self.folder, self.first_secret)
        entries = self.now().entries
        again = self.deliver()
        assert again.sent == last.sent
        assert self.now().entries == entries
        assert audit(self.folder).epsilon > self.spent_before
        assert audit(self.folder).charges == self.round


def trace(tracer: Tracer, trial: Trial) -> list[Step]:
    """The steps of delivering a trial's message undisturbed, found on a copy."""
    with scratch_copy(trial.folder) as scratch:
        return steps_of(tracer, lambda: transmit(len, answer(scratch, trial.data)))


@pytest.fixture(scope="module")
def steps(tmp_path_factory) -> dict[Tracer, list[Step]]:
    """The steps of an undisturbed answer."""
    trial = Trial(tmp_path_factory.mktemp("steps"))
    trace(lines, trial)  # caches fill up
    return {tracer: trace(tracer, trial) for tracer in (lines, calls)}


def kill_at_random(folder: Path, steps: dict[Tracer, list[Step]], seed: int) -> None:
    generator = random.Random(seed)
    trial = Trial(folder, round=generator.choice((1, 2)))
    tracer = (lines, calls)[seed % 2]
    for _ in range(generator.choice((1, 1, 2, 3))):
        trial.deliver(Kill(generator.randrange(1, len(steps[tracer]) + 1), tracer))
    trial.finish()


@pytest.mark.parametrize("seed", range(KILLS))
def test_a_node_killed_anywhere_charges_once_and_releases_once(tmp_path, steps, seed):
    kill_at_random(tmp_path, steps, seed)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(KILLS, KILLS + SOAK_KILLS))
def test_the_same_at_many_more_moments(tmp_path, steps, seed):
    kill_at_random(tmp_path, steps, seed)


def kill_before_each(trial: Trial, folder: Path, chosen: Callable[[Step], bool]) -> set[Step]:
    """Not a sample: kill before each chosen line that delivering the message runs, at one of its turns."""
    turns: dict[Step, list[int]] = {}
    for turn, step in enumerate(trace(lines, trial), start=1):
        if chosen(step):
            turns.setdefault(step, []).append(turn)
    generator = random.Random(1)
    for step, numbers in turns.items():
        mortal = trial.copied(folder)
        try:
            life = mortal.deliver(Kill(generator.choice(numbers)))
            assert life.told["died"] == [list(step)]
            mortal.finish()
        except BaseException as error:
            error.add_note(f"killed before {step}")
            raise
        shutil.rmtree(folder)
    return set(turns)


def test_a_node_may_die_before_every_line_of_reserving_and_committing(tmp_path, steps):
    bodies = [inspect.unwrap(function).__code__ for function in (Ledger.reserve, Ledger.commit, transaction)]
    decisive = {(code.co_filename, line) for code in bodies for _, _, line in code.co_lines() if line is not None}
    assert len(kill_before_each(Trial(tmp_path / "trial"), tmp_path / "copy", decisive.__contains__)) > 20


@pytest.mark.slow
@pytest.mark.parametrize("earlier", EARLIER)
def test_a_node_may_die_before_every_line(tmp_path, steps, earlier):
    trial = Trial(tmp_path / "trial")
    for kill in EARLIER[earlier]:
        assert trial.deliver(kill).killed
    died = kill_before_each(trial, tmp_path / "copy", lambda step: True)
    print(f"{earlier}: killed before {len(died)} lines")
    files = {Path(name).name for name, _ in died}
    assert {"ledger.py", "store.py", "witness.py", "heads.py", "entry.py", "node.py", "app.py"} <= files
    assert len(died) > 200


@pytest.mark.parametrize("deaths", [1, 2, 3])
def test_two_attempts_then_the_charge_is_given_up(tmp_path, deaths):
    """A crash can depend on the batch: whoever could make a node try again and again would learn from it."""
    trial = Trial(tmp_path)
    for _ in range(deaths):
        trial.deliver(IN_TRAINING)
    assert [life.killed for life in trial.lives] == [True, True, False][:deaths]
    assert len(trial.trained) == min(deaths, 2)
    last = trial.deliver()
    if deaths == 1:
        assert answer_of(last.sent)[1] == trial.due.body
    else:
        assert code_of(last.sent) == "charge-abandoned"
        assert trial.replies == []
        assert trial.now().states == ["RESERVED", "ABANDONED"]
    assert audit(tmp_path).epsilon > 0  # spent, whatever became of it
    trial.finish()


@pytest.mark.parametrize("change", ["threads", "code", "start state"])
def test_what_cannot_be_repeated_exactly_is_given_up(tmp_path, change):
    trial = Trial(tmp_path, round=2)
    assert trial.deliver(IN_TRAINING).killed
    changes = {
        "threads": lambda _: mock.patch("torch.get_num_threads", return_value=2),
        "code": lambda _: mock.patch("conclave.clients.node_ledger.code_hash", return_value="0" * 64),
    }
    if change == "start state":  # another round of the plan was answered meanwhile, and moved the clip bound
        answer_of(deliver(tmp_path, message(asked(round=3))).sent)
    life = deliver(tmp_path, trial.data, patch=changes.get(change))
    assert code_of(life.sent) == "charge-abandoned"
    assert "trained" not in life.told
    assert code_of(deliver(tmp_path, trial.data).sent) == "charge-abandoned"  # also where all is as before
    left = trial.now()
    assert (left.states, left.secret, left.reply) == (["RESERVED", "ABANDONED"], None, None)
    assert int(left.entry(trial.charge_id, "RESERVED").rdp_charge) > 0
    assert audit(tmp_path).abandoned == 1


@pytest.mark.parametrize(("change", "states"), [(2, []), (3, ["RESERVED"]), (4, ["RESERVED", "COMMITTED"])])
def test_a_power_cut_between_the_database_and_its_witness_is_made_up_for(tmp_path, change, states):
    """The witness follows the database. What it has not seen yet, it sees at the next start."""
    trial = Trial(tmp_path)
    # Opening mirrors first; then follow the plan's admission, the reservation and the commit.
    assert trial.deliver(Kill(change, entering(Store._mirror.__code__))).killed
    left = trial.now()
    assert left.states == states
    assert left.entries[-1].seq == witness_of(tmp_path).read().seq + 1 == change - 1
    node = open_node(tmp_path)
    assert witness_of(tmp_path).read() == node.ledger.head
    assert node.ledger.head.seq == change - 1
    assert node.ledger._db.execute("PRAGMA synchronous").fetchone() == (2,)  # the log is flushed at every commit
    node.ledger.close()
    trial.finish()


def secret_is_gone(folder: Path, secret: bytes) -> bool:
    """Erased means overwritten: in no file, the log of the database included."""
    return not any(path.is_file() and secret in path.read_bytes() for path in folder.rglob("*"))


@pytest.mark.parametrize("open_already", [False, True])
def test_a_secret_is_erased_although_its_process_died_first(tmp_path, open_already):
    """The database forgets it at the commit, its log only afterwards: what was released would tell the data."""
    trial = Trial(tmp_path)
    child = None
    if open_already:
        go, start = os.pipe()
        child = Child(lambda send, tell: late_redelivery(tmp_path, trial.data, go, send, tell))
        assert child.hear() == "open"
    assert trial.deliver(Kill(1, entering(Ledger._prune.__code__))).killed
    assert trial.now().states == ["RESERVED", "COMMITTED"]
    assert not secret_is_gone(tmp_path, trial.first_secret)
    if child is None:
        open_node(tmp_path)
    else:
        os.write(start, b"x")
        assert answer_of(child.end().sent)[1] == trial.due.body
    assert secret_is_gone(tmp_path, trial.first_secret)


def late_redelivery(folder, data, go, send, tell) -> None:
    node = open_node(folder)
    tell("open", "")
    os.read(go, 1)
    send(answer(folder, data, node))
