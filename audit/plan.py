"""Whether the entries of a ledger state what the plan they name would have charged.

The plan is public, and what it charges is worked out from the plan alone, by the function that nodes draw charges
with. What an entry says is compared with that, field by field; that an entry agrees with itself proves nothing.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping

from conclave.privacy.ledger.entry import INFINITE, ChargeRequest, Entry, charge_id_of, plan_id_of
from conclave.privacy.ledger.genesis import Genesis
from conclave.privacy.ledger.mechanism_text import PLAN_END, fields_of, parse_plan, spell_plan
from conclave.privacy.ledger.reading.verification import least_price, shown
from conclave.protocol.charges import SIDES, ChargeKind, PlannedCharges, charges_of
from conclave.protocol.plan import Plan

_NOT_STATED = "not stated"


class PlanAudit:
    """Compares entries of one ledger with one plan.

    codes: hashes of the code that is known to have run; with None they are not compared.
    """

    def __init__(self, plan: Plan, genesis: Genesis, codes: frozenset[str] | None) -> None:
        self._plan, self._genesis, self._codes = plan, genesis, codes
        every = charges_of(plan)
        self._planned = {kind: planned for kind, planned in every.items() if planned.side == genesis.side}
        self._others = every.keys() - self._planned.keys()
        seeded = genesis.mode == "simulation"
        self._charges = {kind: planned.request("", seeded=seeded) for kind, planned in every.items()}
        self._by_releases = {charge.releases_json(): kind for kind, charge in self._charges.items()}
        self._known: dict[tuple[str, ...], list[str]] = {}
        self._admitted: set[str] = set()
        self._found: dict[str, list[int]] = defaultdict(list)

    def take(self, entry: Entry) -> None:
        """Compare the next entry that names the plan."""
        if entry.state == "ADMITTED":
            self._admitted.add(entry.run_id)
            self._say(entry, [*self._admission(entry), *self._of_no_charge(entry)])
        elif entry.state == "CLOSED":
            self._say(entry, self._of_no_charge(entry))
        elif entry.state == "RESERVED":
            self._say(entry, self._charge(entry))
        if (
            entry.state in ("ADMITTED", "RESERVED", "COMMITTED")
            and self._codes is not None
            and entry.code_hash not in self._codes
        ):
            known = " or ".join(sorted(self._codes))
            self._say(entry, [f"code is {shown(entry.code_hash)}, the run's is {known}"])

    def kind(self, entry: Entry) -> ChargeKind | None:
        """Return the kind that a charge's name is the hash of; None where it is of no kind that a plan can have."""
        for kind in SIDES:
            named = charge_id_of(
                kind,
                ledger_id=self._genesis.ledger_id,
                run_id=entry.run_id,
                round_number=entry.round,
                plan_hash=entry.plan_hash,
                model_in_hash=entry.model_in_hash,
            )
            if named == entry.charge_id:
                return kind
        return None

    def findings(self) -> Iterator[str]:
        """Yield one sentence for each difference, with the entries that have it."""
        for what, entries in self._found.items():
            more = f" and {len(entries) - 1} more" if len(entries) > 1 else ""
            yield f"entry {entries[0]}{more}: {what}"

    def _say(self, entry: Entry, differences: Iterable[str]) -> None:
        for what in differences:
            self._found[what].append(entry.seq)

    def _charge(self, entry: Entry) -> list[str]:
        found = []
        proven = self.kind(entry)
        kind = proven or self._by_releases.get(entry.releases, "train")
        if proven is None:
            found.append("its charge id is not that of its run, round, ledger, plan and model, of any kind")
        planned = self._planned.get(kind)
        if planned is None:
            side = f"on the {self._genesis.side} side"
            return [*found, f"kind is {kind}, the plan has none {'at all' if kind not in self._others else side}"]
        if not planned.is_due(entry.round):
            found.append(f"round is {entry.round}, the plan has {self._rounds(kind, planned)}")
        # Version 1 had no admissions; what states the code of a run never wrote it.
        if (entry.version > 1 or self._codes is not None) and entry.run_id not in self._admitted:
            found.append("its plan was not admitted before it was charged")
        stated = (kind, entry.mechanism_text, entry.releases, entry.rng, entry.rdp_charge)
        if stated not in self._known:  # equal statements are compared once
            self._known[stated] = differences(entry, self._charges[kind], float(self._genesis.order))
        return found + self._known[stated]

    def _of_no_charge(self, entry: Entry) -> Iterator[str]:
        """Compare what else the beginning and the end of a plan state with what every ledger writes there."""
        wanted: dict[str, str | int] = {
            "charge_id": plan_id_of(self._genesis.ledger_id, entry.run_id, entry.plan_hash),
            "round": 0,
            "model_in_hash": "",
            "output_hash": "",
        }
        if entry.state == "CLOSED":
            wanted |= {"code_hash": "", "releases": "[]", "rng": "", "mechanism_text": PLAN_END}
        for name, value in wanted.items():
            if (said := getattr(entry, name)) != value:
                yield f"{name.removesuffix('_text')} is {shown(str(said))}, must be {value!r} where it is {entry.state}"

    def _rounds(self, kind: ChargeKind, planned: PlannedCharges) -> str:
        if kind == "train":
            return f"rounds 1 to {self._plan.rounds}"
        return f"{planned.count} of kind {kind} in rounds 1 to {self._plan.rounds}, and none there"

    def _admission(self, entry: Entry) -> list[str]:
        expected = [(self._charges[kind].mechanism_json(), planned.count) for kind, planned in self._planned.items()]
        if not expected:
            return ["admits a plan that charges nothing on this side"]
        try:
            aside = parse_plan(entry.mechanism_text)
        except ValueError:
            return ["admits what cannot be read, must be what the plan charges"]
        found = []
        for place, (mechanism, count) in enumerate(expected):
            if place >= len(aside.planned):
                found.append(f"admits no {count} charges of {mechanism}, which the plan has")
                continue
            said, times = aside.planned[place]
            if times != count:
                found.append(f"admits {times} charges, the plan has {count}")
            found += [f"admits charges whose {what}" for what in _mechanism_differences(said, mechanism)]
        beyond = aside.planned[len(expected) :]
        found += [f"admits {times} charges of {shown(said)}, the plan has none" for said, times in beyond]
        if not found and entry.mechanism_text != (spelled := spell_plan(expected, str(aside.units))):
            found.append(f"admission is spelled {shown(entry.mechanism_text)}, the plan's is {spelled}")
        first = self._charges[next(iter(self._planned))]
        for name, said, planned in (
            ("releases", entry.releases, first.releases_json()),
            ("rng", entry.rng, first.rng),
        ):
            if said != planned:
                found.append(f"{name} is {shown(said)}, the plan says {planned}")
        return found


def differences(entry: Entry, charge: ChargeRequest, order: float) -> list[str]:
    """Compare what an entry states with a charge, except for its round and model; return one phrase per difference.

    Args:
        order: RDP order of the ledger.
    """
    found = _mechanism_differences(entry.mechanism_text, charge.mechanism_json())
    for name, stated, planned in (
        ("releases", entry.releases, charge.releases_json()),
        ("rng", entry.rng, charge.rng),
    ):
        if stated != planned:
            found.append(f"{name} is {shown(stated)}, the plan says {planned}")
    least = INFINITE if charge.mechanism is None else str(least_price(charge.mechanism, order))
    if not _pays(entry.rdp_charge, least):
        found.append(f"rdp_charge is {shown(entry.rdp_charge)}, must be at least {least} by the plan")
    return found


def _pays(charged: str, least: str) -> bool:
    if INFINITE in (charged, least):
        return charged == INFINITE
    try:
        return int(charged) >= int(least)
    except ValueError:
        return False


def _mechanism_differences(stated: str, planned: str) -> list[str]:
    """Compare two spellings of a mechanism; each field that differs is a finding."""
    if stated == planned:
        return []
    said, wanted = fields_of(stated), fields_of(planned) or {}
    if said is None:
        return [f"mechanism is {shown(stated)}, the plan says {planned}"]
    if (kind := said.get("kind", "None")) != wanted["kind"]:
        return [f"kind of mechanism is {shown(kind)}, the plan says {wanted['kind']}"]
    found = list(_differences(said, wanted))
    return found or [f"mechanism is spelled {shown(stated)}, the plan's is {planned}"]


def _differences(said: Mapping[str, str], wanted: Mapping[str, str]) -> Iterator[str]:
    for name in [*wanted, *(name for name in said if name not in wanted)]:
        one, other = said.get(name, _NOT_STATED), wanted.get(name, "nothing of it")
        if one != other:
            yield f"{shown(name)[1:-1]} is {one if one == _NOT_STATED else shown(one)[1:-1]}, the plan says {other}"
