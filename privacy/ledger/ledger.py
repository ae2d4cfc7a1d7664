"""The owner's ledger: what was spent, written before it is spent, and the reply it paid for.

One SQLite file per node and dataset, readable by its owner only. A charge is RESERVED, durably, before
private data is touched; the reply is stored in the same transaction that marks the charge COMMITTED. So a
crash at any moment can lose work but never a charge, and a redelivered request gets the stored bytes.
"""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from pydantic import ValidationError

from conclave.base.canonical import sha256
from conclave.base.errors import BadInputError
from conclave.privacy.accounting.filter import epsilon_of
from conclave.privacy.ledger.drawn import Drawn
from conclave.privacy.ledger.entry import INFINITE, ChargeRequest, Entry, State, add_units, plan_id_of
from conclave.privacy.ledger.errors import (
    AlreadyChargedError,
    BudgetExhaustedError,
    ChargeAbandonedError,
    ChargeConflictError,
    PlanClosedError,
    ReplyExpiredError,
)
from conclave.privacy.ledger.heads import SignedHead
from conclave.privacy.ledger.mechanism_text import PLAN_END, spell_plan
from conclave.privacy.ledger.schema import bound_to
from conclave.privacy.ledger.store import Store
from conclave.privacy.ledger.witness import Witness

_MOST_ATTEMPTS = 2
_FOLLOWED_RUNS = 8
KEPT_REPLIES = 8
"""Replies that a ledger keeps for redelivery, the latest ones. Older requests are answered ``reply-expired``."""


@dataclass(frozen=True)
class Reservation:
    """A paid charge whose output does not exist yet. ``secret`` seeds everything random in it."""

    charge_id: str
    request: ChargeRequest
    secret: bytes


@dataclass(frozen=True)
class StoredReply:
    """The output of a charge, and the ledger's head when it was committed."""

    charge_id: str
    body: bytes
    receipt: SignedHead


class Ledger(Store):
    """An open ledger. Several processes may reserve and commit at once."""

    def __init__(
        self, path: Path, key: Ed25519PrivateKey, *, witness: Witness | None = None, machine: str | None = None
    ) -> None:
        """Open an existing ledger; see :class:`Store`."""
        super().__init__(path, key, witness=witness, machine=machine)
        self._followed: dict[str, Drawn] = {}

    @contextmanager
    def lease(self) -> Iterator[None]:
        """Work on this ledger's charges, one worker at a time.

        A redelivery during a live run waits here and then finds the stored reply; the operating system frees the
        lease of a worker that dies. Commits are decided by compare-and-swap whether or not anyone holds it.
        """
        lock = os.open(self.path.with_name(f"{self.path.name}.lock"), os.O_CREAT | os.O_RDWR, 0o600)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX)
            self._erase_log()  # the worker before may have been killed just before it did
            yield
        finally:
            os.close(lock)

    def admit(
        self,
        request: ChargeRequest,
        charges: int,
        also: Sequence[tuple[ChargeRequest, int]] = (),
        *,
        time: str | None = None,
    ) -> None:
        """Set the budget of a whole plan aside: ``charges`` charges like ``request``. A second time: nothing.

        Args:
            also: other charges of the same plan, and how many of each.
            time: when the plan was admitted elsewhere, see :meth:`admitted_at`; now, if it was not. When it is
                asked for here may depend on how long work on private data took.

        Raises:
            BudgetExhaustedError: what is neither spent nor set aside does not suffice.
            PlanClosedError: the plan was closed.
            BadInputError: see :meth:`reserve`.
        """
        self._refuse_what_only_simulations_do(request)
        price = self._price(request)
        more = sum(int(self._price(other)) * count for other, count in also)
        set_aside = "0" if price == INFINITE else str(int(price) * charges + more)
        with self._change():
            row = self._db.execute(
                "SELECT open FROM plans WHERE run_id = ? AND plan_hash = ?", (request.run_id, request.plan_hash)
            ).fetchone()
            if row is not None:
                if not row[0]:
                    raise PlanClosedError
                return
            if price != INFINITE:
                self._refuse_overspending(self._last()[1], self.units_set_aside + int(set_aside))
            planned = [(item.mechanism_json(), count) for item, count in ((request, charges), *also)]
            self._append(
                "ADMITTED",
                plan_id_of(self.genesis.ledger_id, request.run_id, request.plan_hash),
                spell_plan(planned, set_aside),
                run_id=request.run_id,
                plan_hash=request.plan_hash,
                code_hash=request.code_hash,
                releases=request.releases_json(),
                rng=request.rng,
                time=time,
            )
            self._db.execute(
                "INSERT INTO plans VALUES (?, ?, ?, '0', 1)", (request.run_id, request.plan_hash, set_aside)
            )

    def knows(self, charge_id: str) -> bool:
        """Whether this charge was made, whatever became of it."""
        return bool(self._rows("SELECT 1 FROM entries WHERE charge_id = ?", charge_id))

    def is_open(self, run_id: str, plan_hash: str) -> bool:
        """Whether budget is set aside for this plan."""
        return bool(self._rows("SELECT 1 FROM plans WHERE run_id = ? AND plan_hash = ? AND open", run_id, plan_hash))

    def admitted_at(self, run_id: str, plan_hash: str) -> str | None:
        """Return the time of a plan's admission; None if it was never admitted."""
        rows = self._rows(
            "SELECT json_extract(body, '$.time') FROM entries WHERE charge_id = ? AND state = 'ADMITTED'",
            plan_id_of(self.genesis.ledger_id, run_id, plan_hash),
        )
        return str(rows[0][0]) if rows else None

    def runs_admitted(self, plan_hash: str) -> list[str]:
        """Return the runs that budget is set aside for under a plan, and that drew nothing of it yet."""
        rows = self._rows("SELECT run_id FROM plans WHERE plan_hash = ? AND open AND drawn = '0'", plan_hash)
        return [str(run_id) for (run_id,) in rows]

    def close_plan(self, run_id: str, plan_hash: str) -> None:
        """Give back what is still set aside for one plan of a run."""
        with self._change():
            if self.is_open(run_id, plan_hash):
                self._close(run_id, plan_hash)

    def close_plans(self, run_id: str) -> int:
        """Give back what is still set aside for a run and forget its local state; return how many plans were open."""
        with self._change():
            rows = self._db.execute("SELECT plan_hash FROM plans WHERE run_id = ? AND open", (run_id,)).fetchall()
            for (plan_hash,) in rows:
                self._close(run_id, plan_hash)
            own = state_of(run_id)
            self._db.execute("DELETE FROM local_state WHERE substr(name, 1, ?) = ?", (len(own), own))
        return len(rows)

    def _close(self, run_id: str, plan_hash: str) -> None:
        plan_id = plan_id_of(self.genesis.ledger_id, run_id, plan_hash)
        self._append("CLOSED", plan_id, PLAN_END, run_id=run_id, plan_hash=plan_hash)
        self._db.execute("UPDATE plans SET open = 0 WHERE run_id = ? AND plan_hash = ?", (run_id, plan_hash))

    def reserve(
        self, request: ChargeRequest, fresh_secret: bytes, *, repeat_key: str = ""
    ) -> Reservation | StoredReply:
        """Charge the budget, durably, before anything is computed from private data.

        Returns a reservation, or the stored reply if this very charge was committed before. A charge that was
        reserved but never committed (a crash) is returned with its first secret: running it again is then the
        same mechanism, not a second one. It is tried at most twice.

        Args:
            repeat_key: names everything else the output depends on (code, numeric environment, start state). If
                it has changed since, the charge cannot be repeated exactly and is abandoned.

        Raises:
            BudgetExhaustedError: the budget does not allow it.
            AlreadyChargedError, ChargeAbandonedError, ChargeConflictError, PlanClosedError, ReplyExpiredError: see
                there.
            LedgerMismatchError: the witness has seen more, or other, than this ledger holds.
            BadInputError: a charge without privacy, or seeded randomness, outside a simulation ledger.
        """
        self._refuse_what_only_simulations_do(request)
        charge_id = request.charge_id(self.genesis.ledger_id)
        with self._change():
            known = self._known(charge_id)
            if not known:
                self._charge(request, charge_id)
                self._db.execute(
                    "INSERT INTO secrets VALUES (?, ?, 1, ?)",
                    (charge_id, fresh_secret, bound_to(fresh_secret, repeat_key)),
                )
                return Reservation(charge_id, request, fresh_secret)
            _refuse_other_content(known["RESERVED"], request)
            if "COMMITTED" in known:
                return self._reply(charge_id)
            if "ABANDONED" in known:
                raise ChargeAbandonedError
            row = self._db.execute(
                "SELECT secret, attempts, repeat_key FROM secrets WHERE charge_id = ?", (charge_id,)
            ).fetchone()
            # There is no secret where the entry came out of an export, after the database was lost.
            if row is not None and row[1] < _MOST_ATTEMPTS and row[2] == bound_to(row[0], repeat_key):
                self._db.execute("UPDATE secrets SET attempts = attempts + 1 WHERE charge_id = ?", (charge_id,))
                return Reservation(charge_id, request, row[0])
            self._append_for(request, charge_id, "ABANDONED")
            self._db.execute("DELETE FROM secrets WHERE charge_id = ?", (charge_id,))
        self._erase_log()
        raise ChargeAbandonedError

    def commit(
        self, reservation: Reservation, body: bytes, local_state: Mapping[str, bytes] | None = None
    ) -> StoredReply:
        """Store the output that a reservation paid for, and return what to send.

        ``local_state`` (name → bytes) is what the same work left on the node for later rounds; it switches together
        with the reply. If another worker committed the same charge first, its reply is returned and both ``body`` and
        ``local_state`` are discarded.

        Raises:
            ValueError: there is no reservation for this charge.
            LedgerMismatchError: see :meth:`reserve`.
        """
        charge_id = reservation.charge_id
        with self._change():
            known = self._known(charge_id)
            if "COMMITTED" in known:
                return self._reply(charge_id)
            if "RESERVED" not in known or "ABANDONED" in known:
                raise ValueError("no reservation pays for this output")
            receipt = self._append_for(reservation.request, charge_id, "COMMITTED", output_hash=sha256(body))
            self._db.execute("INSERT INTO replies VALUES (?, ?, ?)", (receipt.seq, charge_id, body))
            for name, state in (local_state or {}).items():
                self._db.execute("INSERT OR REPLACE INTO local_state VALUES (?, ?)", (name, state))
            self._db.execute("DELETE FROM secrets WHERE charge_id = ?", (charge_id,))
        self._prune()
        self._erase_log()
        return StoredReply(charge_id, body, receipt)

    def local_state(self, name: str) -> bytes | None:
        """Return what the last committed charge left under this name."""
        rows = self._rows("SELECT body FROM local_state WHERE name = ?", name)
        return bytes(rows[0][0]) if rows else None

    @property
    def epsilon_spent(self) -> float:
        """ε of everything charged so far at the ledger's δ; ``inf`` after a charge without privacy."""
        total = self._last()[1]
        if total == INFINITE:
            return float("inf")
        return epsilon_of(int(total), float(self.genesis.order), float(self.genesis.delta))

    @property
    def units_set_aside(self) -> int:
        """RDP units that open plans may still draw."""
        rows = self._rows("SELECT set_aside, drawn FROM plans WHERE open")
        return sum(max(0, int(set_aside) - int(drawn)) for set_aside, drawn in rows)

    def _refuse_what_only_simulations_do(self, request: ChargeRequest) -> None:
        if self.genesis.mode != "simulation" and (request.mechanism is None or request.rng == "seeded"):
            raise BadInputError("training without privacy or with seeded noise is allowed in simulation only")

    def _price(self, request: ChargeRequest) -> str:
        if request.mechanism is None:
            return INFINITE
        from conclave.privacy.accounting.prices import charge_units  # who only reads a ledger does without

        return str(charge_units(request.mechanism, float(self.genesis.order)))

    def _charge(self, request: ChargeRequest, charge_id: str) -> None:
        """Draw a charge from the plan it belongs to, or from the rest of the budget if none was admitted."""
        self._refuse_more_than_planned(request)
        price = self._price(request)
        if price != INFINITE:
            plan = (request.run_id, request.plan_hash)
            row = self._db.execute(
                "SELECT drawn FROM plans WHERE run_id = ? AND plan_hash = ? AND open", plan
            ).fetchone()
            if row is not None:
                drawn = add_units(row[0], price)
                self._db.execute("UPDATE plans SET drawn = ? WHERE run_id = ? AND plan_hash = ?", (drawn, *plan))
            self._refuse_overspending(add_units(self._last()[1], price), self.units_set_aside)
        self._append_for(request, charge_id, "RESERVED", charge=price)

    def _refuse_more_than_planned(self, request: ChargeRequest) -> None:
        """Let through one charge a round, and no more than were admitted; inside the transaction that charges."""
        drawn = self._followed.pop(request.run_id, None) or Drawn(self.genesis.ledger_id, request.run_id)
        drawn.catch_up(self._db)
        self._followed[request.run_id] = drawn  # as the latest
        while len(self._followed) > _FOLLOWED_RUNS:
            del self._followed[next(iter(self._followed))]
        if drawn.has_charged(request):
            raise AlreadyChargedError
        row = self._db.execute(
            "SELECT open FROM plans WHERE run_id = ? AND plan_hash = ?", (request.run_id, request.plan_hash)
        ).fetchone()
        if row is None:
            return  # of no plan, as what a server publishes: the budget alone bounds it
        if not row[0]:
            raise PlanClosedError
        if not drawn.is_left(request):
            raise AlreadyChargedError

    def _refuse_overspending(self, total: str, set_aside: int) -> None:
        if total == INFINITE or int(total) + set_aside > int(self.genesis.rdp_budget):
            raise BudgetExhaustedError

    def _append_for(
        self, request: ChargeRequest, charge_id: str, state: State, *, charge: str = "0", output_hash: str = ""
    ) -> SignedHead:
        return self._append(
            state,
            charge_id,
            request.mechanism_json(),
            charge,
            run_id=request.run_id,
            round_number=request.round,
            plan_hash=request.plan_hash,
            code_hash=request.code_hash,
            model_in_hash=request.model_in_hash,
            output_hash=output_hash,
            releases=request.releases_json(),
            rng=request.rng,
        )

    def _known(self, charge_id: str) -> dict[str, Entry]:
        """Return the entries of a charge by state."""
        rows = self._rows("SELECT state, body FROM entries WHERE charge_id = ?", charge_id)
        return {state: Entry.parse(body) for state, body in rows}

    def _reply(self, charge_id: str) -> StoredReply:
        row = self._db.execute(
            "SELECT r.seq, e.hash, e.signature, r.body, json_extract(e.body, '$.output_hash') "
            "FROM replies r JOIN entries e USING (seq, charge_id) WHERE r.charge_id = ?",
            (charge_id,),
        ).fetchone()
        if row is None:
            raise ReplyExpiredError
        seq, head_hash, signature, body, output_hash = row
        if sha256(body) != output_hash:
            raise ReplyExpiredError  # damaged: nothing but what was paid for is sent
        receipt = self._receipt(seq, head_hash, signature)
        if receipt is None:
            raise ReplyExpiredError
        return StoredReply(charge_id, bytes(body), receipt)

    def _receipt(self, seq: int, head_hash: str, signature: str) -> SignedHead | None:
        """Return the head of an entry; None if the file's signature is not by one of this ledger's keys."""
        try:
            head = SignedHead(ledger_id=self.genesis.ledger_id, seq=seq, hash=head_hash, signature=signature)
        except ValidationError:
            return None
        keys = (self.genesis.public_key, *(rotation.new_key for rotation in self.rotations))
        return head if any(map(head.signed_by, keys)) else None

    def _prune(self) -> None:
        """Forget replies beyond the latest; they have been sent, so nothing need be overwritten."""
        with self._one_thread:
            self._db.execute("PRAGMA secure_delete = OFF")
            self._db.execute(
                "DELETE FROM replies WHERE seq <= (SELECT seq FROM replies ORDER BY seq DESC LIMIT 1 OFFSET ?)",
                (KEPT_REPLIES,),
            )
            self._db.execute("PRAGMA secure_delete = ON")


def state_of(run_id: str) -> str:
    """Return how the names of a run's local state begin, which ends with the run."""
    return f"run/{run_id}/"


def _refuse_other_content(entry: Entry, request: ChargeRequest) -> None:
    stored = (entry.mechanism_text, entry.releases, entry.rng)
    if stored != (request.mechanism_json(), request.releases_json(), request.rng):
        raise ChargeConflictError
