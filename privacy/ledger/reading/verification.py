"""Audit of one ledger: whether its history is whole, and whether its prices and its budget hold.

Everything is recomputed from the entries; nothing that the ledger claims about itself is believed. One pass, a few
microseconds an entry: the chain costs one hash each, and one signature at the head covers it all.
"""

from __future__ import annotations

import json
import math
from collections import Counter, defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field
from hashlib import sha256
from operator import itemgetter
from typing import Any, NoReturn

from pydantic import ValidationError

from conclave.base.errors import BadInputError
from conclave.privacy.accounting.filter import UNITS_PER_NAT, budget_units, epsilon_of
from conclave.privacy.accounting.mechanisms import Mechanism, SampledGaussian
from conclave.privacy.ledger.entry import ENTRY_TYPES, INFINITE
from conclave.privacy.ledger.genesis import FORMAT_VERSION, Genesis, ledger_id_of
from conclave.privacy.ledger.heads import SignedHead
from conclave.privacy.ledger.mechanism_text import Charged, Restored, check_named, parse, parse_plan, parse_rotation
from conclave.privacy.ledger.reading.history import History

_MOST_FINDINGS = 50
_LARGEST_EPSILON = 100.0
_LAST_DIGITS = 1000  # RDP units: another machine's logarithm is no violation

_FIELDS = sorted(ENTRY_TYPES)  # the order in which canonical JSON spells them
_TYPES = [ENTRY_TYPES[name] for name in _FIELDS]

_content = itemgetter("mechanism", "run_id", "round", "plan_hash", "model_in_hash", "releases", "rng")
"""What a charge's entries have in common."""


_BLANK: dict[str, tuple[tuple[str, str], ...]] = {
    "RESERVED": (("output_hash", ""),),
    "COMMITTED": (("rdp_charge", "0"),),
    "ABANDONED": (("rdp_charge", "0"), ("output_hash", "")),
    "ADMITTED": (("rdp_charge", "0"),),
    "CLOSED": (("rdp_charge", "0"),),
}
"""What entries of a state always leave empty."""


@dataclass
class LedgerAudit:
    """What an audit of one ledger found.

    entries: lines after the genesis. charges, committed, abandoned: of those charges. pending: reserved, and neither
        committed nor abandoned: work in progress, or lost in a crash, and spent either way.
    epsilon: the enforced value recomputed from the mechanisms, ``inf`` if any charge was without privacy.
    accountants: ε of the same charges by RDP (best order), PLD and PRV; empty without privacy, above ε = 100 and where
        something was found, for they take minutes or fail on absurd charges. Right for charges that were fixed in
        advance; none of them enforces. grid: how many kinds of charges were rounded upward for them.
    joint: one line for each kind of charge that released several things from one sample.
    restored: how often it was started from a copy. unproven: whether one of these times the rest of the budget was
        charged for what the copy may have lacked.
    witnessed: whether a witness was compared. receipts: how many receipts were.
    findings: one sentence per violation; empty when the ledger holds.
    """

    ledger_id: str
    dataset_id: str = ""
    mode: str = ""
    unit: str = ""
    entries: int = 0
    charges: int = 0
    committed: int = 0
    abandoned: int = 0
    pending: int = 0
    epsilon: float = 0.0
    budget: float = 0.0
    delta: float = 0.0
    order: float = 0.0
    accountants: dict[str, float] = field(default_factory=dict)
    grid: str | None = None
    joint: list[str] = field(default_factory=list)
    seeded: bool = False
    rotations: int = 0
    restored: int = 0
    unproven: bool = False
    witnessed: bool = False
    receipts: int = 0
    findings: list[str] = field(default_factory=list)


def audit_history(
    history: History, *, witness: SignedHead | None = None, receipts: Iterable[SignedHead] = ()
) -> LedgerAudit:
    """Check chain, signatures, states, prices, totals and budget of a ledger, and recompute its ε.

    Args:
        witness: the head that the owner's witness holds; the ledger must reach it.
        receipts: heads that the ledger sent with replies; each must lie on the chain.

    Raises:
        BadInputError: the history cannot be read at all.
    """
    audit = _Audit(history.genesis, witness, receipts)
    for line in history.lines():
        audit.take(line)
    return audit.result(history.head)


class _Audit:
    """The state of one pass."""

    def __init__(self, genesis: Genesis, witness: SignedHead | None, receipts: Iterable[SignedHead]) -> None:
        self.order, self.delta = float(genesis.order), float(genesis.delta)
        self.genesis = genesis
        self.found = LedgerAudit(
            genesis.ledger_id,
            dataset_id=genesis.dataset_id,
            mode=genesis.mode,
            unit=genesis.unit,
            budget=float(genesis.epsilon),
            delta=self.delta,
            order=self.order,
            witnessed=witness is not None,
        )
        self.unsaid = 0
        self.budget = self._budget()
        self.prev_hash = genesis.hash
        self.version = genesis.version
        self.total = 0
        self.without_privacy = False
        self.open: dict[str, tuple[object, ...]] = {}
        self.ended: set[str] = set()
        self.plans: dict[tuple[str, str], int] = {}
        self.left: dict[tuple[str, str], Counter[str]] = {}
        self.closed: set[tuple[str, str]] = set()
        self.charged: dict[tuple[str, str], set[int]] = defaultdict(set)
        self.set_aside = 0
        self.mechanisms: Counter[str] = Counter()
        self.parsed: dict[str, tuple[int, Charged]] = {}
        self.keys = [(0, genesis.public_key)]
        self.restored_at: list[int] = []
        self.beyond: dict[str, list[int]] = defaultdict(list)
        self.seen = [("receipt", head) for head in receipts]
        self.found.receipts = len(self.seen)
        if witness is not None:
            self.seen.append(("witness", witness))
        self.wanted = {head.seq for _, head in self.seen}
        self.hashes = {0: genesis.hash}

    def say(self, sentence: str) -> None:
        if len(self.found.findings) < _MOST_FINDINGS:
            self.found.findings.append(sentence)
        else:
            self.unsaid += 1

    def _budget(self) -> int:
        genesis = self.genesis
        budget, stated = budget_units(float(genesis.epsilon), self.delta, self.order), int(genesis.rdp_budget)
        if stated > budget + _LAST_DIGITS:
            self.say(f"genesis: RDP budget {stated}, must be at most {budget} for the stated epsilon")
        else:
            budget = stated
        try:
            named = ledger_id_of(genesis.public_key)
        except ValueError:
            named = "of a key in hexadecimal"
        if genesis.ledger_id != named:
            self.say(f"genesis: ledger id {shown(genesis.ledger_id)}, must be {named}, which belongs to its key")
        return budget

    def take(self, line: bytes) -> None:
        """Check the next entry."""
        found = self.found
        found.entries += 1
        position = found.entries
        digest = sha256(line).hexdigest()
        if position in self.wanted:
            self.hashes[position] = digest
        try:
            entry = _read(line)
            if entry["prev_hash"] != self.prev_hash:
                self.say(f"entry {position}: the hash chain does not hold, so the one before it was altered")
            if entry["seq"] != position:
                self.say(f"entry {position}: numbered {entry['seq']:d}, must be {position}: one is missing or moved")
            if entry["ledger_id"] != found.ledger_id or entry["rdp_budget"] != self.genesis.rdp_budget:
                self.say(f"entry {position}: names another ledger or budget, must be that of the genesis")
            if not self.version <= entry["version"] <= FORMAT_VERSION:
                version = f"format version {entry['version']:d}"
                self.say(f"entry {position}: {version}, must be {self.version} to {FORMAT_VERSION}: it never falls")
            else:
                self.version = entry["version"]
            self._check_blank(position, entry)
            self._add(position, entry, self._price(position, entry))
        except (ValueError, TypeError, KeyError, AttributeError, OverflowError, RecursionError):
            self.say(f"entry {position}: cannot be read, must be one JSON object with an entry's fields")
        self.prev_hash = digest

    def _check_blank(self, position: int, entry: dict[str, Any]) -> None:
        """Check that an entry leaves empty what entries of its state never have."""
        state = entry["state"]
        for name, blank in _BLANK.get(state, ()):
            if entry[name] != blank:
                said = shown(entry[name])
                self.say(f"entry {position}: {name} is {said}, must be {blank!r} where it is {state}")
        if state == "COMMITTED" and not entry["output_hash"]:
            self.say(f"entry {position}: output_hash is '', must be that of what was released")

    def _price(self, position: int, entry: dict[str, Any]) -> int:
        """Check what the entry does, and return what it must at least be charged."""
        state, charge_id = entry["state"], entry["charge_id"]
        if state == "RESERVED":
            return self._reserved(position, entry)
        if state in ("COMMITTED", "ABANDONED"):
            before = self.open.pop(charge_id, None)
            if before is None:
                after = "an ended charge" if charge_id in self.ended else "nothing"
                self.say(f"entry {position}: state {state} cannot follow {after}")
            elif before != _content(entry):
                self.say(
                    f"entry {position}: ends a charge with another mechanism, run, plan, model, release or "
                    "randomness than it began with"
                )
            elif state == "ABANDONED":  # nothing was released, so the round may be charged anew
                self.charged[entry["run_id"], _kind(entry["releases"])].discard(entry["round"])
            self.ended.add(charge_id)
            if state == "COMMITTED":
                self.found.committed += 1
            else:
                self.found.abandoned += 1
        elif state == "ADMITTED":
            self._admitted(position, entry)
        elif state == "CLOSED":
            plan = (entry["run_id"], entry["plan_hash"])
            if plan not in self.plans:
                self.say(f"entry {position}: closes a plan that is not open")
            self.set_aside -= self.plans.pop(plan, 0)
            self.closed.add(plan)
        elif state == "ROTATED":
            self._rotated(position, entry)
        elif state == "RESTORED":
            return self._restored(position, entry)
        elif state != "MIGRATED":
            self.say(f"entry {position}: state {shown(state)}, which no entry can have")
        return 0

    def _reserved(self, position: int, entry: dict[str, Any]) -> int:
        charge_id = entry["charge_id"]
        if charge_id in self.open or charge_id in self.ended:
            self.say(f"entry {position}: state RESERVED cannot follow an earlier entry of the same charge")
        self.open[charge_id] = _content(entry)
        self.found.charges += 1
        self._drawn(position, entry)
        if entry["rng"] == "seeded":
            self.found.seeded = True
            if self.genesis.mode != "simulation":
                self.say(f"entry {position}: seeded randomness, must not exist outside simulation")
        text = entry["mechanism"]
        try:
            price, charged = self._look_up(text)
            if "," in entry["releases"]:
                names = [ascii(name)[1:-1] for name in json.loads(entry["releases"])]
                check_named(charged.mechanism, names, charged.parts)
        except BadInputError as error:
            self.say(f"entry {position}: {error}")
            return 0
        self.mechanisms[text] += 1
        if charged.mechanism is None:
            self.without_privacy = True
            if self.genesis.mode != "simulation":
                self.say(f"entry {position}: a charge without privacy, must not exist outside simulation")
            if entry["rdp_charge"] != INFINITE:
                self.say(f"entry {position}: charged an amount, must be {INFINITE} without privacy")
        else:
            plan = (entry["run_id"], entry["plan_hash"])
            if plan in self.plans:
                drawn = min(self.plans[plan], _units(entry["rdp_charge"]))
                self.plans[plan] -= drawn
                self.set_aside -= drawn
        return price

    def _drawn(self, position: int, entry: dict[str, Any]) -> None:
        """Check that a plan draws one charge a round, and no more than it was admitted with."""
        run_id, round_number, text = entry["run_id"], entry["round"], entry["mechanism"]
        rounds = self.charged[run_id, _kind(entry["releases"])]
        if round_number in rounds:
            what = f"{shown(entry['releases'])} of run {shown(run_id)}"
            self.say(f"entry {position}: charges {what} in round {round_number} once more, must be once a round")
        rounds.add(round_number)
        plan = (run_id, entry["plan_hash"])
        if plan in self.closed:
            self.say(f"entry {position}: charges a plan that was closed")
        left = self.left.get(plan)
        if left is None:
            return
        if text not in left:
            self.say(f"entry {position}: its mechanism is not among those that its plan was admitted with")
        elif not left[text]:
            self.say(f"entry {position}: is one charge more than its plan was admitted with")
        else:
            left[text] -= 1

    def _look_up(self, text: str) -> tuple[int, Charged]:
        """Return price and meaning of a spelling; equal spellings are worked out once."""
        known = self.parsed.get(text)
        if known is None:
            charged = parse(text)
            price = 0 if charged.mechanism is None else least_price(charged.mechanism, self.order)
            known = self.parsed[text] = (price, charged)
        return known

    def _admitted(self, position: int, entry: dict[str, Any]) -> None:
        plan = (entry["run_id"], entry["plan_hash"])
        aside = parse_plan(entry["mechanism"])
        if plan in self.plans or plan in self.closed:
            self.say(f"entry {position}: admits a plan for the second time")
        self.left[plan] = aside.most
        needed = 0
        for mechanism, charges in aside.planned:
            try:
                needed += self._look_up(mechanism)[0] * charges
            except BadInputError as error:
                self.say(f"entry {position}: {error}")
        if aside.units < needed:
            self.say(f"entry {position}: sets {aside.units} aside, must be at least {needed} for its charges")
        self.set_aside += aside.units - self.plans.get(plan, 0)
        self.plans[plan] = aside.units
        if self.total + self.set_aside > self.budget:
            self.say(f"entry {position}: sets more aside than the budget of {self.genesis.epsilon} has left")

    def _rotated(self, position: int, entry: dict[str, Any]) -> None:
        try:
            rotation = parse_rotation(entry["mechanism"])
        except ValidationError:
            rotation = None
        if rotation is None or not rotation.holds(self.found.ledger_id, self.keys[-1][1]):
            self.say(f"entry {position}: a change of keys that the old and the new key did not both sign")
            return
        self.found.rotations += 1
        self.keys.append((position, rotation.new_key))

    def _restored(self, position: int, entry: dict[str, Any]) -> int:
        self.found.restored += 1
        self.closed.update(self.plans)
        self.plans.clear()
        self.set_aside = 0
        if Restored.parse(entry["mechanism"]).proven:
            return 0
        self.found.unproven = True
        self.restored_at.append(position)
        return 0 if self.without_privacy else max(0, self.budget - self.total)

    def _add(self, position: int, entry: dict[str, Any], price: int) -> None:
        """Check charge, total and budget."""
        charge, total = entry["rdp_charge"], entry["rdp_total"]
        if charge == INFINITE:
            if not self.without_privacy:
                self.say(f"entry {position}: charged {INFINITE}, must be an amount where there is privacy")
        else:
            units = int(charge)
            if str(units) != charge:
                raise ValueError("not spelled as a ledger does")
            if units < price:
                self.say(f"entry {position}: charged {charge}, must be at least {price} for its mechanism")
            self.total += max(units, price)
        expected = INFINITE if self.without_privacy else str(self.total)
        if total != expected:
            self.say(f"entry {position}: total {shown(total)}, must be {expected}")
        if price and not self.without_privacy and self.total + self.set_aside > self.budget:
            self.say(f"entry {position}: spends more than the budget of {self.genesis.epsilon}, must stay within it")

    def result(self, head: SignedHead) -> LedgerAudit:
        """Check the signed heads and sum up."""
        found = self.found
        found.pending = len(self.open)
        found.joint = [line for text, count in self.mechanisms.items() if (line := self._joint(text, count))]
        self._check_head(head)
        for what, seen in self.seen:
            self._check_seen(what, seen)
        for what, beyond in self.beyond.items():
            self._say_missing(what, beyond)
        if self.unsaid:
            found.findings.append(f"and {self.unsaid} more")
        if self.without_privacy:
            found.epsilon = float("inf")
            return found
        try:
            found.epsilon = epsilon_of(self.total, self.order, self.delta)
        except OverflowError:  # charges that no float can count
            found.epsilon = float("inf")
        counts: Counter[Mechanism] = Counter()
        for text, count in self.mechanisms.items():
            mechanism = self.parsed[text][1].mechanism
            if mechanism is not None:
                counts[mechanism] += count
        if not found.findings and found.epsilon <= _LARGEST_EPSILON:
            from conclave.privacy.accounting.accountants import accountant_report  # takes longer to load than all else

            report = accountant_report(counts, self.delta)
            found.accountants, found.grid = report.epsilon, report.grid
        return found

    def _joint(self, text: str, count: int) -> str | None:
        charged = self.parsed[text][1]
        if not isinstance(charged.mechanism, SampledGaussian) or not charged.parts:
            return None
        named = ", ".join(f"{ascii(name)[1:-1]} (sigma {noise:g})" for name, noise in charged.parts.items())
        sigma = charged.mechanism.noise_multiplier
        return f"{count} charges of {named} from one sample each, as one event of sigma {sigma:g}"

    def _check_head(self, head: SignedHead) -> None:
        entries = self.found.entries
        if (head.ledger_id, head.seq, head.hash) != (self.found.ledger_id, entries, self.prev_hash):
            self.say(f"the signed head is of entry {head.seq}, and does not match the last of {entries} entries")
        elif not head.signed_by(self._key_at(head.seq)):
            self.say("the head is not signed with the ledger's key, so the history is not vouched for")

    def _check_seen(self, what: str, seen: SignedHead) -> None:
        """Check a head that someone else kept."""
        if seen.ledger_id != self.found.ledger_id:
            self.say(f"a {what} is of ledger {seen.ledger_id}, must be of this one")
            return
        on_chain = self.hashes.get(seen.seq) == seen.hash
        if on_chain:
            if not seen.signed_by(self._key_at(seen.seq)):
                self.say(f"the {what} of entry {seen.seq} is not signed with the ledger's key")
            return
        if not any(seen.signed_by(key) for _, key in self.keys):
            self.say(f"a {what} of entry {seen.seq} is not signed with the ledger's key, so it proves nothing")
        elif any(position <= seen.seq for position in self.restored_at):
            return  # of the history that a restore lost; the rest of the budget was charged for it
        elif seen.seq > self.found.entries:
            self.beyond[what].append(seen.seq)
        else:
            self.say(f"entry {seen.seq} is not the one that a {what} proves: this is another history")

    def _say_missing(self, what: str, beyond: list[int]) -> None:
        """Report together what has one cause: the ledger was cut, or it is an export from before these entries."""
        proof = f"a {what} proves entry {beyond[0]}"
        if len(beyond) > 1:
            proof = f"{len(beyond)} {what}s prove entries up to {max(beyond)}"
        self.say(f"ends at entry {self.found.entries}, but {proof}: entries are missing, or an export is too old")

    def _key_at(self, seq: int) -> str:
        return next(key for since, key in reversed(self.keys) if since <= seq)


def least_price(mechanism: Mechanism, order: float) -> int:
    """Return what a charge must at least cost, in RDP units at ``order``.

    It leaves out the rounding margin of a charge: another machine's last digit is not a violation.

    Raises:
        BadInputError: no budget could pay for it.
    """
    from conclave.privacy.accounting.prices import rdp_at  # a ledger without charges needs none

    return math.floor(rdp_at(mechanism, order) * UNITS_PER_NAT)


def _read(line: bytes) -> dict[str, Any]:
    """Read an entry: its fields in canonical order and of the right types, and nothing after them."""
    text = line.decode()
    entry: dict[str, Any]
    entry, end = _DECODER.raw_decode(text)
    if end != len(text) or list(entry) != _FIELDS or list(map(type, entry.values())) != _TYPES:
        raise ValueError("not an entry")
    return entry


def _kind(releases: str) -> str:
    """Tell charges of a run apart that may be of one round: with what is released from one sample, the loads are."""
    return '["delta"]' if '"delta"' in releases else releases


def _refuse(text: str) -> NoReturn:
    raise ValueError(f"{text} is a number that no entry has")


_DECODER = json.JSONDecoder(parse_float=_refuse, parse_constant=_refuse)


def shown(text: str) -> str:
    """Quote what someone else wrote, safe and short enough for a terminal."""
    return ascii(text if len(text) <= 40 else f"{text[:40]}…")


def _units(text: str) -> int:
    return 0 if text == INFINITE else int(text)
