"""Every optional section of the report, there and not there.

Each condition of the template is watched: over all pages here it must have been true once and false once. So a section
that asks for what is not there any more cannot go unseen until a run needs it.
"""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import pytest
from jinja2 import Environment, FileSystemLoader, StrictUndefined, Template, nodes

from conclave.privacy.ledger.reading.verification import LedgerAudit
from conclave.protocol.charges import choice_share
from conclave.report import report
from conclave.server.run_directory import RunDirectory
from conclave.server.scenario import read_scenario
from conclave.simulations.shipped import find
from conclave.simulations.simulate import simulate

SMALL = {"federation.rounds": 2, "partition.nodes": 3}
CHOOSING = {
    "federation.assignment": "affinity", "affinity": {"every": 1, "epsilon": 0.05},
    "model.experts.router": {"kind": "sigmoid"}, "balancing": {"share": 0.1, "rate": 0.1},
    "evaluation": {"held_out": 0.2},
}  # fmt: skip


@pytest.fixture(scope="module")
def everything(tmp_path_factory) -> dict[str, Any]:
    """What a run leaves that chooses experts, releases loads and measures held-out units."""
    run = RunDirectory.create(read_scenario(find("digits"), SMALL | CHOOSING), tmp_path_factory.mktemp("all") / "run")
    simulate(run.scenario, run)
    return report.contents_of(run)


def pages(whole: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Contents by what is special about them."""

    def changed(**parts: Any) -> dict[str, Any]:
        return {**whole, **parts}

    def scenario_with(**changes: Any) -> dict[str, Any]:
        scenario = read_scenario(find("digits"), SMALL | changes)
        return changed(scenario=scenario, plan=scenario.plan(), choice_share=0.0, held_out=None)

    def of(**parts: Any) -> Any:
        scenario = whole["scenario"]
        return scenario.model_copy(update={k: getattr(scenario, k).model_copy(update=v) for k, v in parts.items()})

    last, audit = whole["last"], whole["audit"]
    text = {key: value for key, value in last.items() if not key.startswith("accuracy")}
    bits = text | {"bits_per_byte": 3.5, "bits_per_byte_without_experts": 4.5, "order0_bits_per_byte": 4.7}
    bad = replace(audit, verdict="VIOLATED", findings=["a finding"])
    broken = [replace(row, audit=replace(row.audit, findings=["bad"], accountants={})) for row in whole["nodes"]]
    held = copy.deepcopy(whole["held_out"])
    text_data = {"source": "stdlib-text", "window": 64}
    traffic = {"traffic": "svg"}
    in_bits = held | {"metric": "bits_per_byte"}
    drowned = held | {"over_units": None, "by_node": dict.fromkeys(held["by_node"])}
    tail = replace(
        audit, unreceived=2, lost=1, missing_ledgers=["a" * 16], node_level=LedgerAudit("0" * 32, epsilon=3.5)
    )
    environment = copy.deepcopy(whole["environment"]) | {"commit": None, "packages": {"torch": None, "numpy": "2"}}
    node_level = {"node_privacy": {"epsilon": 8.0, "delta": 0.01, "clip": 1.0, "nodes": 3}}
    poisson = {"federation.cohort": {"kind": "poisson", "rate": 0.9}, "federation.weights": "uniform"}
    at_node_level = scenario_with(**node_level, **poisson, **{"federation.assignment": "random"})
    return {
        "everything": whole,
        "plain": scenario_with(),
        "open": scenario_with(**{"privacy.mechanism": "none"}) | {"private": False},
        "open, measured": scenario_with(**{"privacy.mechanism": "none", "evaluation": {"held_out": 0.2}})
        | {"private": False, "held_out": held},
        "node level": at_node_level | {"audit": tail},
        "strict, groups": changed(scenario=of(privacy={"numeric": "strict", "unit": "group", "records_per_unit": 4})),
        "ghost": changed(scenario=of(privacy={"gradients": "ghost"})),
        "text": changed(scenario=of(data=text_data), last=bits, held_out=in_bits),
        "no public records": changed(scenario=of(data={"source": "nodes"}), last=text, figures=traffic, layers=[]),
        "deployed": changed(nodes=[], audit=replace(tail, node_level=None), environment=environment),
        "nobody told": changed(held_out=drowned),
        "held-out ledgers elsewhere": changed(audit=replace(audit, held_out={})),
        "violated": changed(audit=bad, nodes=broken),
        "trouble": changed(
            dropped_by={"replay": 1, "not-finite": 2}, unchanged=1, without_holder=2,
        ),
        "older": changed(holders=[], without_holder=0),
        "quiet": changed(dropped_by={}, unchanged=0, without_holder=0),
    }  # fmt: skip


class Watched:
    """The template, telling what each of its conditions came to."""

    def __init__(self) -> None:
        environment = Environment(
            loader=FileSystemLoader(report._TEMPLATES), autoescape=True, undefined=StrictUndefined, trim_blocks=True
        )
        source, name, _ = environment.loader.get_source(environment, report.TEMPLATE)
        tree = environment.parse(source, report.TEMPLATE, name)
        self.seen: dict[str, set[bool]] = {}
        lines = source.splitlines()
        for number, node in enumerate([*tree.find_all(nodes.If), *tree.find_all(nodes.CondExpr)]):
            where = f"condition {number}, line {node.lineno}: {lines[node.lineno - 1][:60]}"
            self.seen[where] = set()
            node.test = nodes.Call(nodes.Name("watch", "load"), [nodes.Const(where), node.test], [], None, None)
        tree.set_environment(environment)
        self._template = Template.from_code(
            environment, environment.compile(tree, report.TEMPLATE, name), {"watch": self._watch}
        )

    def _watch(self, where: str, value: object) -> object:
        self.seen[where].add(bool(value))
        return value

    def render(self, contents: dict[str, Any]) -> str:
        return self._template.render(contents)


def test_every_optional_section_can_be_there_and_not_there(everything):
    watched = Watched()
    for name, contents in pages(everything).items():
        page = watched.render(contents)
        assert page == report.render(contents), name
        assert "bound method" not in page, name
        assert "<function" not in page, name
        assert " object at 0x" not in page, name
    one_sided = {where: found for where, found in watched.seen.items() if len(found) < 2}
    assert one_sided == {}


def test_what_is_chosen_released_and_measured_is_said(everything):
    page = report.render(everything)
    plan, order = everything["plan"], 3.4
    share = choice_share(plan, order)
    assert 0.0 < share < 1.0
    for text in (
        f"1 times {plan.affinity.experts} choices of experts a layer by the exponential mechanism, ε = 0.05 each, "
        f"{100 * share:.1f} % of the budget",
        "two releases from each sample that are one event",
        "20 % of each node&#39;s units never train" if "&#39;" in page else "20 % of each node's units never train",
        "Held-out units",
    ):
        assert text in page, text


def test_a_page_that_asks_for_what_is_not_there_is_an_error(everything):
    contents = {name: value for name, value in everything.items() if name != "choice_share"}
    with pytest.raises(Exception, match="'choice_share' is undefined"):
        report.render(contents)
