"""Where a budget stands: spent, set aside, left, and what each run took."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from conclave.base.errors import BadInputError
from conclave.privacy.accounting.filter import epsilon_of
from conclave.privacy.accounting.mechanisms import Mechanism
from conclave.privacy.ledger.entry import INFINITE, Entry
from conclave.privacy.ledger.genesis import Genesis
from conclave.privacy.ledger.mechanism_text import parse_plan
from conclave.privacy.ledger.reading.history import History


@dataclass
class RunSpending:
    """What one run took. ``units`` are RDP at the ledger's order, 1e-12 each; infinite without privacy.

    share: of the whole budget. set_aside, set_aside_share: what its open plans may still draw.
    """

    run_id: str
    first: str
    last: str = ""
    charges: int = 0
    committed: int = 0
    abandoned: int = 0
    units: float = 0
    share: float = 0.0
    set_aside: int = 0
    set_aside_share: float = 0.0


@dataclass
class Budget:
    """Where one ledger stands. The claim is ``epsilon`` at ``delta``; the rest is book-keeping towards it.

    spent, committed_to: ε of what is spent, and of that together with what is set aside; ``inf`` without privacy.
    left: ε between ``committed_to`` and the budget.
    shares: of the RDP budget: spent, set aside, left. RDP adds up, ε does not.
    free_units: RDP that is left, in units of 1e-12.
    curve: (time, ε) after each charge.
    """

    ledger_id: str
    dataset_id: str
    mode: str
    unit: str
    epsilon: float
    delta: float
    order: float
    spent: float
    committed_to: float
    left: float
    shares: dict[str, float]
    free_units: int
    runs: list[RunSpending]
    curve: list[tuple[str, float]] = field(default_factory=list)


@dataclass(frozen=True)
class Forecast:
    """What a plan would add to a budget.

    epsilon_after: ε once it and everything already set aside are spent. fits: whether the node would admit it.
    accountants: ε of the plan alone by RDP (best order), PLD and PRV (by RDP alone where experts are chosen); right
        because it is fixed as a whole.
    """

    charges: int
    share: float
    epsilon_after: float
    fits: bool
    accountants: dict[str, float]


def budget_of(history: History) -> Budget:
    """Sum a ledger up, as its entries state it; whether they are true is for the audit to decide.

    Raises:
        BadInputError: the history cannot be read, or adds up to nothing.
    """
    tally = _Tally(history.genesis)
    try:
        for line in history.lines():
            tally.add(Entry.parse(line))
        return tally.result()
    except BadInputError:
        raise
    except (ValueError, KeyError, TypeError, OverflowError, RecursionError) as error:
        raise BadInputError("the entries cannot be summed up, must be those of a ledger") from error


def forecast(budget: Budget, genesis: Genesis, charges: Mapping[Mechanism, int]) -> Forecast:
    """Say what charges (mechanism → how many) would add.

    Raises:
        BadInputError: a mechanism costs more than any budget.
    """
    from conclave.privacy.accounting.accountants import epsilon_by_accountant  # who only sums up does without
    from conclave.privacy.accounting.prices import charge_units

    most = int(genesis.rdp_budget)
    cost = sum(count * charge_units(mechanism, budget.order) for mechanism, count in charges.items())
    after = most - budget.free_units + cost
    epsilon = float("inf") if budget.spent == float("inf") else epsilon_of(after, budget.order, budget.delta)
    accountants = epsilon_by_accountant(charges, budget.delta)
    return Forecast(sum(charges.values()), cost / most, epsilon, cost <= budget.free_units, accountants)


class _Tally:
    def __init__(self, genesis: Genesis) -> None:
        self.genesis = genesis
        self.order, self.delta, self.most = float(genesis.order), float(genesis.delta), int(genesis.rdp_budget)
        self.total: float = 0
        self.runs: dict[str, RunSpending] = {}
        self.plans: dict[tuple[str, str], int] = {}
        self.curve: list[tuple[str, float]] = []

    def add(self, entry: Entry) -> None:
        plan = (entry.run_id, entry.plan_hash)
        if entry.state in ("RESERVED", "ADMITTED"):
            run = self.runs.setdefault(entry.run_id, RunSpending(entry.run_id, entry.time))
        elif entry.state in ("COMMITTED", "ABANDONED"):
            run = self.runs[entry.run_id]
            run.committed += entry.state == "COMMITTED"
            run.abandoned += entry.state == "ABANDONED"
        elif entry.state == "RESTORED":
            self.plans.clear()
            self._spend(entry)
            return
        else:
            self.plans.pop(plan, None)
            return
        run.last = entry.time
        if entry.state == "ADMITTED":
            self.plans[plan] = parse_plan(entry.mechanism_text).units
        elif entry.state == "RESERVED":
            run.charges += 1
            units = self._spend(entry)
            run.units += units
            if plan in self.plans:
                self.plans[plan] = max(0, self.plans[plan] - int(min(units, self.plans[plan])))

    def _spend(self, entry: Entry) -> float:
        units = float("inf") if entry.rdp_charge == INFINITE else int(entry.rdp_charge)
        self.total += units
        self.curve.append((entry.time, self._epsilon(self.total)))
        return units

    def _epsilon(self, units: float) -> float:
        return float("inf") if units == float("inf") else epsilon_of(int(units), self.order, self.delta)

    def result(self) -> Budget:
        for run in self.runs.values():
            run.share = run.units / self.most
            run.set_aside = sum(units for (run_id, _), units in self.plans.items() if run_id == run.run_id)
            run.set_aside_share = run.set_aside / self.most
        set_aside = sum(self.plans.values())
        spent, committed_to = self._epsilon(self.total), self._epsilon(self.total + set_aside)
        epsilon = float(self.genesis.epsilon)
        left = int(max(0, self.most - self.total - set_aside))
        return Budget(
            ledger_id=self.genesis.ledger_id,
            dataset_id=self.genesis.dataset_id,
            mode=self.genesis.mode,
            unit=self.genesis.unit,
            epsilon=epsilon,
            delta=self.delta,
            order=self.order,
            spent=spent,
            committed_to=committed_to,
            left=max(0.0, epsilon - committed_to),
            shares={
                "spent": self.total / self.most,
                "set_aside": set_aside / self.most,
                "left": left / self.most,
            },
            free_units=left,
            runs=list(self.runs.values()),
            curve=self.curve,
        )
