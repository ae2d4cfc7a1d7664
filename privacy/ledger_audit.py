"""Audit of one ledger: whether its history is whole and its prices hold.

Everything is recomputed from the entries; nothing that the ledger claims about itself is believed.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, field

from model.errors import BadInputError
from privacy.accounting import (
    UNITS_PER_NAT,
    SampledGaussian,
    budget_units,
    epsilon_by_accountant,
    epsilon_of,
    rdp_at,
)
from privacy.ledger_entry import INFINITE, Entry, Genesis, add_units

_ALLOWED_NEXT = {None: {"RESERVED"}, "RESERVED": {"COMMITTED", "ABANDONED"}}


@dataclass
class LedgerAudit:
    """The result of :func:`audit_entries`.

    epsilon: the enforced value recomputed from the mechanisms, ``inf`` if any charge was without privacy.
    accountants: ε of the same charges by RDP (best order), PLD and PRV; empty without privacy.
    findings: one sentence per violation; empty when the ledger holds.
    """

    ledger_id: str
    charges: int = 0
    abandoned: int = 0
    epsilon: float = 0.0
    budget: float = 0.0
    delta: float = 0.0
    accountants: dict[str, float] = field(default_factory=dict)
    seeded: bool = False
    findings: list[str] = field(default_factory=list)


def audit_entries(genesis: Genesis, entries: list[Entry]) -> LedgerAudit:
    """Check chain, states, prices, totals and budget of a ledger, and recompute its ε."""
    order, delta = float(genesis.order), float(genesis.delta)
    result = LedgerAudit(genesis.ledger_id, budget=float(genesis.epsilon), delta=delta)
    say = result.findings.append
    budget = budget_units(float(genesis.epsilon), delta, order)
    if int(genesis.rdp_budget) > budget:
        say(f"genesis: RDP budget {genesis.rdp_budget}, must be at most {budget} for the stated epsilon")
    prev_hash, total, states = genesis.hash, "0", dict[str, str]()
    mechanisms: list[SampledGaussian] = []
    without_privacy = False
    for position, entry in enumerate(entries, start=1):
        where = f"entry {position}"
        if entry.seq != position:
            say(f"{where}: numbered {entry.seq}, must be {position}: an entry is missing or out of order")
        if entry.prev_hash != prev_hash or entry.entry_hash != entry.computed_hash():
            say(f"{where}: the hash chain does not hold, so this entry or one before it was altered")
        before = states.get(entry.charge_id)
        if entry.state not in _ALLOWED_NEXT.get(before, set()):
            say(f"{where}: state {entry.state} cannot follow {before or 'nothing'}")
        price = "0"
        if entry.state == "RESERVED":
            try:
                mechanism = parse_mechanism(entry.mechanism)
            except BadInputError as error:
                say(f"{where}: {error}")
                continue
            result.charges += 1
            if mechanism is None:
                price, without_privacy = INFINITE, True
                if genesis.mode != "simulation":
                    say(f"{where}: a charge without privacy, must not exist outside simulation")
            else:
                # Without the rounding margin: another machine's last digit is no violation.
                price = str(math.floor(rdp_at(mechanism, order) * UNITS_PER_NAT))
                mechanisms.append(mechanism)
        if _less(entry.rdp_charge, price):
            say(f"{where}: charged {entry.rdp_charge}, must be at least {price} for its mechanism")
        total = add_units(total, max((entry.rdp_charge, price), key=_amount))
        if entry.rdp_total != add_units("0", total):
            say(f"{where}: total {entry.rdp_total}, must be {total}")
        if entry.rng == "seeded":
            result.seeded = True
            if genesis.mode != "simulation":
                say(f"{where}: seeded randomness, must not exist outside simulation")
        result.abandoned += entry.state == "ABANDONED"
        states[entry.charge_id] = entry.state
        prev_hash = entry.entry_hash
    if without_privacy:
        result.epsilon = float("inf")
    else:
        result.epsilon = epsilon_of(int(total), order, delta)
        result.accountants = epsilon_by_accountant(mechanisms, delta)
        if int(total) > budget:
            say(f"spent epsilon {result.epsilon:.4f}, must be at most the budget of {genesis.epsilon}")
    return result


def parse_mechanism(text: str) -> SampledGaussian | None:
    """Read an entry's mechanism; None is a charge without privacy.

    Raises:
        BadInputError: not a mechanism that this Conclave knows.
    """
    try:
        document = json.loads(text)
        if document["kind"] == "none":
            return None
        if document["kind"] != "gaussian" or document["sampler"] != "poisson":
            raise ValueError
        return SampledGaussian(
            sampling_rate=float(document["q"]),
            noise_multiplier=float(document["sigma"]),
            steps=int(document["steps"]),
        )
    except (ValueError, TypeError, KeyError) as error:
        raise BadInputError("its mechanism cannot be read, must be a Poisson-sampled gaussian or none") from error


def _amount(text: str) -> float:
    return float("inf") if text == INFINITE else int(text)


def _less(left: str, right: str) -> bool:
    return _amount(left) < _amount(right)
