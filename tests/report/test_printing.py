"""What people are shown: at every width, on a terminal and in a pipe, nothing of it is cut."""

from __future__ import annotations

import dataclasses
import re

import pytest

from conclave.audit.ledger import LedgersAudit
from conclave.audit.run import RunAudit
from conclave.privacy.audit.subject import Finding
from conclave.privacy.ledger.reading.spending import Budget, RunSpending
from conclave.privacy.ledger.reading.verification import LedgerAudit
from conclave.report import tables
from conclave.report.budget import BudgetReport
from conclave.report.model_card import model_card
from conclave.report.printing import Fields, print_table
from conclave.server.estimate import PlanEstimate
from conclave.server.scenario import read_scenario
from conclave.simulations.shipped import find

LONG = "unit 3 moved the sum by 1.25, must be at most 1; so much that a line of eighty columns does not hold it, " * 3
FINDINGS = [Finding("isolation", "8 units, alone and in company", LONG + "END"), Finding("noise", "400 values", None)]
LEDGER = LedgerAudit(
    ledger_id="0" * 32, charges=3, epsilon=7.5, budget=8.0, delta=1e-5, accountants={"rdp": 7.4, "pld": 7.3},
    findings=[LONG + "END"], joint=["a joint release"], seeded=True, pending=2, grid="rounded", unproven=True,
)  # fmt: skip
LEDGERS = {f"/a/very/long/path/of-a-node/whose-name-is-long-too-{i}/ledger-of-ward-{i}.db": LEDGER for i in range(2)}
RUN = RunAudit(
    verdict="VIOLATED", run_id="7", plan_hash="0" * 64, rounds=3, nodes=2, receipts=6, matched=5, lost=1, unreceived=1,
    epsilon=7.5, ledgers=LEDGERS, missing_ledgers=["a" * 16, "b" * 16], findings=[LONG + "END"], node_level=LEDGER,
    held_out=LEDGERS,
)  # fmt: skip
PLAN = PlanEstimate(
    plan_hash="0" * 64, rounds=3, steps=3, noise_multiplier=1.5, noise_parts={"delta": 1.6, "loads": 2.0},
    load_share=0.1, order=3.4, epsilon=8.0, delta=1e-5, accountants={"rdp": 7.9},
    parameters_total=10, parameters_per_node=5,
    bytes_down=10, bytes_up=10, bytes_full_model=40, holders_per_expert=1.5, short_of_holders=0.5,
    seconds_per_node_round=0.1, seconds_total=1.0, choices=2, evaluations=1, evaluation_noise=2.5, choice_share=0.125,
    node_noise_multiplier=1.0, node_epsilon=8.0, node_delta=0.01,
)  # fmt: skip
SPENT = RunSpending("a run with a name", "2026-01-01T00:00:00+00:00", "2026-01-02T00:00:00+00:00", 3, share=0.9375)
BUDGET = BudgetReport(
    "node", Budget(
        ledger_id="0" * 32, dataset_id="ward", mode="simulation", unit="record", epsilon=8.0, delta=1e-5, order=3.4,
        spent=7.5, committed_to=8.0, left=0.0, shares={"spent": 0.9375, "left": 0.0}, free_units=0, runs=[SPENT],
    ), plot="/a/plot.svg",
)  # fmt: skip


def words_of(document: object) -> set[str]:
    """Every word of every text in a document."""
    if isinstance(document, str):
        return set(document.split())
    if dataclasses.is_dataclass(document):
        document = {f.name: getattr(document, f.name) for f in dataclasses.fields(document)}
    if isinstance(document, dict):
        return set().union(*(words_of(item) for pair in document.items() for item in pair))
    return set().union(*map(words_of, document)) if isinstance(document, list | tuple) else set()


@pytest.fixture(params=["pipe", 40, 80, 200])
def width(request, monkeypatch):
    """Print for a pipe, or for a terminal so many columns wide."""
    for name in ("FORCE_COLOR", "TTY_COMPATIBLE", "NO_COLOR"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("COLUMNS", "80" if request.param == "pipe" else str(request.param))
    if request.param != "pipe":
        monkeypatch.setenv("FORCE_COLOR", "1")
        monkeypatch.setenv("TERM", "xterm")
    return request.param


def printed(capsys) -> str:
    out = re.sub(r"\x1b\[[0-9;]*m", "", capsys.readouterr().out)
    assert "…" not in out
    return out


def test_every_finding_of_a_model_is_shown_whole(width, capsys):
    tables.print_findings(FINDINGS)
    out = printed(capsys)
    for finding in FINDINGS:
        assert finding.check in out
        assert finding.looked_at in out
    assert f"VIOLATED: {LONG}END" in out
    assert "not refuted" in out
    assert ("check      isolation" in out) == (width != "pipe")  # one field a line where a row does not fit


def test_every_finding_of_ledgers_and_of_a_run_is_shown_whole(width, capsys):
    tables.print_ledger_audits(LedgersAudit("VIOLATED", LEDGERS))
    ledgers = printed(capsys)
    tables.print_run_audit(RUN)
    run = printed(capsys)
    for path in LEDGERS:
        assert f"{path}: {LONG}END" in ledgers
        assert f"{path}: a joint release" in run
    for out in (ledgers, run):
        assert out.count("VIOLATED") >= 2
        assert words_of(
            ["ledger-of-ward-0.db", "7.5000", "1e-05", "7.4000", "7.3000", "RDP", "PLD", "PRV"]
        ) <= words_of(out)
    for text in (LONG + "END", "a" * 16 + ", " + "b" * 16, "findings below", "6, of which 5 match", "1 paid replies"):
        assert text in run


def test_plans_models_and_budgets_are_shown_whole(width, capsys):
    scenario = read_scenario(find("digits"), {"partition.nodes": 3})
    tables.print_model_card(model_card(scenario, None))
    assert words_of(["parameters;", "node", "2", "in", "one", "expert"]) <= words_of(printed(capsys))
    tables.print_plan(PLAN)
    plan = printed(capsys)
    assert PLAN.plan_hash in plan
    for text in (
        "sigma 1.5",
        "2 times a node chooses its experts, 12.5% of the budget",
        "on this machine",
        "sigma 2.5 each",
    ):
        assert text in plan
    tables.print_budget(BUDGET)
    budget = printed(capsys)
    assert words_of(BUDGET.budget.runs[0].run_id) <= words_of(budget)
    for text in ("7.5000", "with what is set aside", "100.0%", BUDGET.budget.runs[0].last, "93.8%"):
        assert text in budget


def test_a_field_is_one_line_and_stays_below_its_name(width, capsys):
    fields = Fields()
    fields.add("verdict", LONG)
    fields.add("", "went\non\x1b[2J")
    fields.add("a longer name", "x")
    fields.print()
    assert printed(capsys).splitlines() == [
        f"verdict        {LONG}".rstrip(), r"               went\non\x1b[2J", "a longer name  x",
    ]  # fmt: skip


def test_columns_fit_wide_characters_and_empty_tables(width, capsys):
    print_table(("name", "n"), [("病院", "1"), ("ward", "[red]2[/]")])
    print_table(("name", "n"), [])
    assert printed(capsys).splitlines() == ["name  n", "病院  1", "ward  [red]2[/]", "name  n"]
