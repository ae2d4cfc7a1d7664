"""Audit of a run: whether the server's receipts, the nodes' ledgers and the plan tell one story.

Every release that the server received must be a committed charge of a ledger whose chain still holds it; every
ledger must still be what its receipts say; every charge must be what the public plan that it names would have charged.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from conclave.audit.plan import PlanAudit, differences
from conclave.base.canonical import canonical_json, decimal
from conclave.base.errors import BadInputError
from conclave.base.verdict import Verdict
from conclave.privacy.accounting.filter import fixed_order
from conclave.privacy.ledger.entry import Entry
from conclave.privacy.ledger.genesis import Genesis, Side, check_pair
from conclave.privacy.ledger.reading.history import History, open_history
from conclave.privacy.ledger.reading.verification import LedgerAudit, audit_history, shown
from conclave.protocol.charges import METRICS, SIDES
from conclave.server.node_level.account import plan_hash_of, published_charge
from conclave.server.replies.receipts import KeptReceipt, read_receipts
from conclave.server.run_directory import RunDirectory

_METRICS = canonical_json([METRICS]).decode()


@dataclass
class RunAudit:
    """What the audit of one run found.

    verdict: VIOLATED if anything contradicts the claim, INCOMPLETE if something is not at hand that it depends on
        (a ledger, the receipts, another run's plan, the version of the code), else NOT_REFUTED. This never proves a run
        private.
    receipts: those the server kept. matched: how many are in the ledgers as committed charges with that very output.
    lost: receipts of history that a ledger lost in a restore, for which the rest of its budget was charged.
    unreceived: committed charges of this run without a receipt: replies that were lost on the way. They are paid for.
    epsilon: the largest over the ledgers, ``inf`` without privacy.
    node_level: the server's own account, where the node is the unit too.
    held_out: audits of the ledgers of held-out units, and held_out_epsilon the largest of them. A unit is on one side
        only, so it bears the one or the other.
    unexamined: ledger → its charges of plans that are not at hand. They are priced as they state.
    unknown_code: ledger → hashes of code that it says it ran and that nobody vouches for.
    """

    verdict: Verdict
    run_id: str
    plan_hash: str
    rounds: int
    nodes: int
    receipts: int
    matched: int
    lost: int
    unreceived: int
    epsilon: float
    ledgers: dict[str, LedgerAudit]
    missing_ledgers: list[str] = field(default_factory=list)
    findings: list[str] = field(default_factory=list)
    node_level: LedgerAudit | None = None
    held_out: dict[str, LedgerAudit] = field(default_factory=dict)
    held_out_epsilon: float = 0.0
    unexamined: dict[str, int] = field(default_factory=dict)
    unknown_code: dict[str, list[str]] = field(default_factory=dict)


def audit_run(
    run: RunDirectory,
    ledgers: Sequence[Path] = (),
    *,
    also: Sequence[RunDirectory] = (),
    codes: Sequence[str] = (),
) -> RunAudit:
    """Compare receipts, ledgers and plan of a run.

    Args:
        ledgers: ledger files or exports of the nodes, besides those that a simulation left in the run directory.
        also: other runs that the same ledgers paid for; their charges are compared with their plans.
        codes: trusted hashes of nodes' code, in addition to that of the code that ran in the run directory.

    Raises:
        BadInputError: not a run directory, or a file in it or a ledger cannot be read.
    """
    audit = _RunAudit(run, also, frozenset(codes))
    for path in (*run.ledgers, *run.held_out_ledgers, *ledgers):
        audit.take(path)
    return audit.result()


class _RunAudit:
    def __init__(self, run: RunDirectory, also: Sequence[RunDirectory], codes: frozenset[str]) -> None:
        self.run = run
        self.scenario = run.scenario
        self.plan = self.scenario.plan()
        self.plan_hash = self.plan.hash
        self.plans = {plan.hash: plan for plan in (self.plan, *(other.scenario.plan() for other in also))}
        self.codes = frozenset(codes).union(*(item.codes for item in (run, *also)))
        self.by_ledger: dict[str, list[KeptReceipt]] = defaultdict(list)
        for kept in read_receipts(run.receipts) if run.receipts.is_file() else ():
            self.by_ledger[kept.receipt.ledger_id].append(kept)
        self.receipts = [kept for found in self.by_ledger.values() for kept in found]
        self.run_ids = {kept.run_id for kept in self.receipts}
        self.audits: dict[Side, dict[str, LedgerAudit]] = {"training": {}, "held-out": {}}
        self.seen: dict[str, str] = {}
        self.genesis: dict[str, Genesis] = {}
        self.unexamined: dict[str, int] = {}
        self.unknown_code: dict[str, list[str]] = {}
        self.findings: list[str] = []
        self.matched = 0
        self.lost = 0
        self.unreceived = 0

    def take(self, path: Path) -> None:
        """Audit one ledger against its receipts."""
        history = open_history(path)
        kept = self.by_ledger.get(history.genesis.ledger_id, [])
        name = str(path)
        if history.genesis.ledger_id in self.seen:
            self.findings.append(f"{name}: is the ledger of {self.seen[history.genesis.ledger_id]} once more")
            return
        self.seen[history.genesis.ledger_id] = name
        self.genesis[history.genesis.ledger_id] = history.genesis
        audit = audit_history(history, receipts=[item.receipt for item in kept])
        self.audits[history.genesis.side][name] = audit
        self.findings += [f"{name}: {finding}" for finding in audit.findings]
        self.findings += [f"{name}: {finding}" for finding in self._constants(history.genesis)]
        self._match(name, history, kept, unproven=audit.unproven)

    def _match(self, name: str, history: History, kept: Sequence[KeptReceipt], *, unproven: bool) -> None:
        """Find each receipt's charge, and each charge's receipt."""
        side = history.genesis.side
        if any(SIDES[item.kind] != side for item in kept):
            self.findings.append(f"{name}: paid for what the units of its side do not take part in")
        wanted = {item.charge_id: item for item in kept}
        if len(wanted) < len(kept):
            self.findings.append(f"{name}: two receipts are for one charge, so an output was sent twice")
        committed: set[str] = set()
        comparing = _Comparing(self, history.genesis)
        for line in history.lines():
            entry = comparing.relevant(line)
            if entry is None or entry.run_id not in self.run_ids or entry.state not in ("RESERVED", "COMMITTED"):
                continue
            if entry.plan_hash != self.plan_hash:
                self.findings.append(
                    f"{name}: entry {entry.seq} is charged for another plan than the run's scenario makes: "
                    f"{shown(entry.plan_hash)}, must be {self.plan_hash}"
                )
            if (entry.releases == _METRICS) != (side == "held-out"):
                self.findings.append(f"{name}: entry {entry.seq} releases what its side is not for")
            if entry.state == "COMMITTED":
                committed.add(entry.charge_id)
                receipt = wanted.get(entry.charge_id)
                if receipt is None:
                    self.unreceived += 1
                else:
                    self._compare(name, entry, receipt, comparing.kind(entry))
        self.findings += [f"{name}: {finding}" for finding in comparing.findings()]
        if comparing.unexamined:
            self.unexamined[name] = comparing.unexamined
        if comparing.unknown_code:
            self.unknown_code[name] = sorted(comparing.unknown_code)
        unpaid = sorted(wanted[charge_id].round for charge_id in wanted.keys() - committed)
        if unproven:
            self.lost += len(unpaid)
        elif len(unpaid) == 1:
            self.findings.append(f"{name}: round {unpaid[0]} was received, but no committed charge paid for it")
        elif unpaid:
            rounds = f"{len(unpaid)} rounds from {unpaid[0]} to {unpaid[-1]}"
            self.findings.append(f"{name}: {rounds} were received, but no committed charges paid for them")

    def _constants(self, genesis: Genesis) -> Iterator[str]:
        """Compare the constants that a ledger was created with, as far as a plan fixes them."""
        wanted = {"unit": self.plan.privacy.unit, "adjacency": "add-or-remove-one"}
        wanted["order"] = decimal(fixed_order(float(genesis.epsilon), float(genesis.delta)))
        if genesis.mode == "simulation":  # elsewhere the owner decides these
            privacy, evaluation = self.scenario.privacy, self.scenario.evaluation
            aside = None if evaluation is None or genesis.side == "training" else evaluation.epsilon
            wanted["epsilon"] = decimal(privacy.epsilon if aside is None else aside)
            wanted["delta"] = decimal(privacy.delta)
            wanted["held_out"] = decimal(0.0 if evaluation is None else evaluation.held_out)
        for name, value in wanted.items():
            stated = getattr(genesis, name)
            if stated != value:
                yield f"genesis: {name} is {shown(stated)}, must be {value} by the run's scenario"
        if self.run.mode not in (None, genesis.mode):
            yield f"genesis: mode is {shown(genesis.mode)}, must be {self.run.mode}, which the run was"

    def _compare(self, name: str, entry: Entry, kept: KeptReceipt, kind: str | None) -> None:
        where = f"{name}: round {kept.round}"
        sound = len(self.findings)
        if entry.output_hash != kept.output_hash:
            self.findings.append(f"{where}: the output that arrived is not the one that was committed")
        if entry.round != kept.round or entry.run_id != kept.run_id:
            self.findings.append(f"{where}: the charge is of round {entry.round} of run {entry.run_id}")
        if kind is not None and kind != kept.kind:
            self.findings.append(f"{where}: the receipt is of kind {kept.kind}, the charge of kind {kind}")
        if entry.seq != kept.receipt.seq or entry.hash != kept.receipt.hash:
            self.findings.append(f"{where}: the receipt is not of the entry that committed its output")
        self.matched += len(self.findings) == sound

    def _check_metrics(self) -> None:
        """Nothing without a receipt may have been averaged."""
        nodes: dict[tuple[str, int], set[str]] = defaultdict(set)
        for kept in self.receipts:
            nodes[kept.kind, kept.round].add(kept.node)
        for line in self.run.metrics():
            measured = line.get("private_evaluation", {}).get("by_node", {})
            if not measured.keys() <= nodes["evaluate", line["round"]]:
                self.findings.append(f"round {line['round']}: a node's evaluation has no receipt")
            received = len(nodes["train", line["round"]])
            if line["accepted"] > received:
                self.findings.append(
                    f"round {line['round']}: {line['accepted']} replies were averaged, but {received} have a receipt"
                )

    def _check_sides(self) -> None:
        """No unit may be on both sides of a node: its two ledgers must divide one data set in the same way."""
        for node, ledger in {(k.node, k.receipt.ledger_id) for k in self.receipts if k.kind == "evaluate"}:
            training = next((found for name, found in self.genesis.items() if name.startswith(node)), None)
            if training is not None and ledger in self.genesis:
                try:
                    check_pair(training, self.genesis[ledger])
                except BadInputError as error:
                    self.findings.append(f"node {node}: {error}")

    def _check_node_level(self) -> LedgerAudit | None:
        """Every round whose model was published must be a committed charge of the server's own account."""
        if self.scenario.node_privacy is None:
            return None
        path = self.run.node_account
        if not path.is_file():
            self.findings.append(f"{path}: missing, so nothing paid for the published models")
            return None
        history = open_history(path)
        audit = audit_history(history)
        self.findings += [f"{path}: {finding}" for finding in audit.findings]
        entries = [Entry.parse(line) for line in history.lines()]
        paid = {entry.round for entry in entries if entry.state in ("COMMITTED", "ABANDONED")}
        unpaid = sorted({line["round"] for line in self.run.metrics()} - paid)
        if unpaid:
            self.findings.append(f"{path}: no charge paid for the model of round {unpaid[0]}")
        self.findings += self._published(path, history.genesis, entries)
        return audit

    def _published(self, path: Path, genesis: Genesis, entries: Sequence[Entry]) -> Iterator[str]:
        """Compare the charges of published models with what the scenario makes them."""
        config, mechanism = self.scenario.node_privacy, self.scenario.node_mechanism()
        if config is None or mechanism is None:
            raise ValueError("the node is no unit")
        wanted = {
            "unit": "node",
            "adjacency": "add-or-remove-one",
            "epsilon": decimal(config.epsilon),
            "delta": decimal(config.delta),
            "order": decimal(fixed_order(config.epsilon, config.delta)),
        }
        if self.genesis:  # the account and the nodes' ledgers are of one run
            wanted["mode"] = next(iter(self.genesis.values())).mode
        for name, value in wanted.items():
            if getattr(genesis, name) != value:
                yield f"{path}: genesis: {name} is {shown(getattr(genesis, name))}, must be {value} by the scenario"
        plan_hash = plan_hash_of(self.plan, config)
        for entry in entries:
            if entry.state not in ("RESERVED", "COMMITTED", "ABANDONED"):
                yield f"{path}: entry {entry.seq}: is {shown(entry.state)}, an account has charges alone"
                continue
            charge = published_charge(
                entry.run_id, entry.round, plan_hash, mechanism, config.clip, seeded=genesis.mode == "simulation"
            )
            found = differences(entry, charge, float(genesis.order)) if entry.state == "RESERVED" else []
            if not 1 <= entry.round <= self.plan.rounds:
                found.append(f"round is {entry.round}, the plan has rounds 1 to {self.plan.rounds}")
            if self.run_ids and entry.run_id not in self.run_ids:
                found.append(f"run is {shown(entry.run_id)}, the receipts are of {' and '.join(sorted(self.run_ids))}")
            if entry.plan_hash != plan_hash:
                found.append(f"plan is {shown(entry.plan_hash)}, the scenario's is {plan_hash}")
            if entry.charge_id != charge.charge_id(genesis.ledger_id):
                found.append("its charge id is not that of its run, round and the scenario's plan")
            if self.codes and entry.code_hash not in self.codes:
                found.append(f"code is {shown(entry.code_hash)}, the run's is {' or '.join(sorted(self.codes))}")
            elif not self.codes:
                self.unknown_code[str(path)] = [shown(entry.code_hash)[1:-1]]
            yield from (f"{path}: entry {entry.seq}: {what}" for what in found)

    def result(self) -> RunAudit:
        self._check_metrics()
        self._check_sides()
        node_level = self._check_node_level()
        for kept in self.receipts:
            if kept.plan_hash != self.plan_hash:
                self.findings.append(f"receipt of round {kept.round}: is for another plan than the scenario makes")
                break
        if len(self.run_ids) > 1:
            self.findings.append(f"the receipts are of {len(self.run_ids)} runs, must be of one")
        absent = [found[0] for ledger, found in self.by_ledger.items() if ledger not in self.seen]
        missing = sorted(f"{kept.node}{' (held-out units)' * (SIDES[kept.kind] == 'held-out')}" for kept in absent)
        modes = {genesis.mode for genesis in self.genesis.values()}
        if len(modes) > 1:
            self.findings.append("some ledgers are of a simulation, others are not; a run is the one or the other")
        complete = bool(self.receipts) and not (missing or self.unexamined or self.unknown_code)
        return RunAudit(
            verdict="VIOLATED" if self.findings else "NOT_REFUTED" if complete else "INCOMPLETE",
            run_id=", ".join(sorted(self.run_ids)),
            plan_hash=self.plan_hash,
            rounds=self.run.metrics()[-1]["round"],
            nodes=len({kept.node for kept in self.receipts}),
            receipts=len(self.receipts),
            matched=self.matched,
            lost=self.lost,
            unreceived=self.unreceived,
            epsilon=_largest(self.audits["training"]),
            ledgers=self.audits["training"],
            missing_ledgers=missing,
            findings=self.findings,
            node_level=node_level,
            held_out=self.audits["held-out"],
            held_out_epsilon=_largest(self.audits["held-out"]),
            unexamined=self.unexamined,
            unknown_code=self.unknown_code,
        )


class _Comparing:
    """One pass over a ledger: which entries are the run's, and what the plans at hand say of them."""

    def __init__(self, audit: _RunAudit, genesis: Genesis) -> None:
        # A simulation runs one code, the run's. Elsewhere nodes may run another version, which somebody must vouch for.
        self._vouched = audit.codes
        self._one_code = genesis.mode == "simulation" and bool(audit.codes)
        codes = audit.codes if self._one_code else None
        self._plans = {plan_hash: PlanAudit(plan, genesis, codes) for plan_hash, plan in audit.plans.items()}
        self._own = next(iter(self._plans.values()))
        # An entry's own text cannot spell these: within a string, quotes are escaped.
        self._named = [
            b'"%s":%s' % (name, canonical_json(value))
            for name, values in ((b"run_id", audit.run_ids), (b"plan_hash", self._plans))
            for value in values
        ]
        self.unexamined = 0
        self.unknown_code: set[str] = set()

    def relevant(self, line: bytes) -> Entry | None:
        """Compare an entry with the plan that it names, and return it; None if it is of another run and plan."""
        if not any(named in line for named in self._named):
            self.unexamined += b'"state":"RESERVED"' in line
            return None
        try:
            entry = Entry.parse(line)
        except BadInputError:  # a finding of the ledger's own audit
            return None
        plan = self._plans.get(entry.plan_hash)
        if plan is not None:
            plan.take(entry)
        if entry.state == "RESERVED" and not self._one_code and entry.code_hash not in self._vouched:
            self.unknown_code.add(ascii(entry.code_hash[:64])[1:-1])
        return entry

    def kind(self, entry: Entry) -> str | None:
        """Return the kind of a charge, whose hash its name is."""
        return self._own.kind(entry)

    def findings(self) -> Iterator[str]:
        """Yield what the plans contradict."""
        for plan in self._plans.values():
            yield from plan.findings()


def _largest(audits: Mapping[str, LedgerAudit]) -> float:
    return max((audit.epsilon for audit in audits.values()), default=0.0)
