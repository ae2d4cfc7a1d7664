"""The report of a run: one self-contained HTML file, rendered from the run directory alone."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from conclave.audit.run import audit_run
from conclave.base.errors import BadInputError
from conclave.base.reading import read_text
from conclave.base.whole_file import write_atomically
from conclave.privacy.accounting.filter import fixed_order
from conclave.privacy.ledger.reading.verification import LedgerAudit
from conclave.protocol.charges import choice_share
from conclave.report import charts
from conclave.report.tables import said_of_held_out
from conclave.server.metrics import dropped_by, unchanged
from conclave.server.run_directory import RunDirectory

_TEMPLATES = Path(__file__).parent / "templates"
TEMPLATE = "report.html.j2"
_ENVIRONMENT = ("started", "python", "platform", "commit", "packages")


@dataclass(frozen=True)
class NodeRow:
    """One node's line in the report."""

    name: str
    fingerprint: str
    audit: LedgerAudit


def write_report(run: RunDirectory) -> Path:
    """Render ``report.html`` into the run directory and return its path.

    Raises:
        BadInputError: the run has no finished round, or a file of it is damaged.
    """
    write_atomically(run.report, render(contents_of(run)).encode())
    return run.report


def render(contents: Mapping[str, Any]) -> str:
    """Fill the template; a name that it asks for and ``contents`` lacks is an error."""
    environment = Environment(
        loader=FileSystemLoader(_TEMPLATES), autoescape=True, undefined=StrictUndefined, trim_blocks=True
    )
    return environment.get_template(TEMPLATE).render(contents)


def contents_of(run: RunDirectory) -> dict[str, Any]:
    """Return what the template asks for, by name. Raises like :func:`write_report`."""
    scenario, metrics = run.scenario, run.whole_metrics()
    audit = audit_run(run)
    nodes = [_node_row(Path(path), ledger) for path, ledger in audit.ledgers.items()]
    last = metrics[-1]
    rounds = [line["round"] for line in metrics]
    private = scenario.privacy.mechanism != "none"
    figures = {
        "traffic": charts.traffic(
            rounds,
            [line["bytes_down_per_node"] for line in metrics],
            [line["bytes_up_per_node"] for line in metrics],
            last["bytes_full_model"],
        ),
    }
    if "load" in last:
        figures = {"quality": _quality(rounds, metrics), **figures}
    if private and nodes:
        figures["epsilon"] = charts.epsilon(
            [row.name for row in nodes], [row.audit.epsilon for row in nodes], scenario.privacy.epsilon
        )
    released = last.get("private_load") or [None] * scenario.model.layers
    layers = [
        charts.load(shares, f"layer {layer}", private)
        for layer, (shares, private) in enumerate(zip(last.get("load", []), released, strict=False))
    ]
    without_holder = last.get("rounds_without_holder", [])  # a run of an older version did not count
    holders = [
        charts.holders(mean, without, f"layer {layer}")
        for layer, (mean, without) in enumerate(zip(last.get("holders_mean", []), without_holder, strict=False))
    ]
    exchanged = last["bytes_down_per_node"] + last["bytes_up_per_node"]
    plan = scenario.plan()
    return {
        "scenario": scenario,
        "toml": read_text(run.path / "scenario.toml", "the run's scenario"),
        "environment": _environment_of(run),
        "plan": plan,
        "choice_share": choice_share(plan, fixed_order(scenario.privacy.epsilon, scenario.privacy.delta)),
        "last": last,
        "rounds": last["round"],
        "private": private,
        "nodes": nodes,
        "audit": audit,
        "figures": figures,
        "layers": layers,
        "holders": holders,
        "without_holder": sum(map(sum, without_holder)),
        "traffic_share": exchanged / last["bytes_full_model"],
        "exchanged": exchanged,
        "held_out": last.get("private_evaluation"),
        "held_out_said": said_of_held_out(last["private_evaluation"]) if "private_evaluation" in last else "",
        "refused": sum(sum(line["refused"].values()) for line in metrics),
        "dropped_by": dropped_by(metrics),
        "missing": sum(line["missing"] for line in metrics),
        "unchanged": unchanged(metrics),
        "seconds": sum(line["seconds"] for line in metrics),
    }


def _environment_of(run: RunDirectory) -> dict[str, Any]:
    """Return what the page names of it: a file that lost some of that is damaged."""
    environment = run.environment
    lost = [name for name in _ENVIRONMENT if name not in environment]
    if lost or not isinstance(environment["packages"], dict):
        what = f"has no {lost[0]}" if lost else "packages is no mapping"
        raise BadInputError(f"{run.path / 'environment.json'}: damaged, must be as the run left it: {what}")
    return environment


def _quality(rounds: list[int], metrics: list[dict[str, Any]]) -> str:
    """Chart what the task measures."""
    name = "accuracy" if "accuracy" in metrics[-1] else "bits_per_byte"
    with_experts = [line[name] for line in metrics]
    without = [line[f"{name}_without_experts"] for line in metrics]
    if name == "accuracy":
        return charts.accuracy(rounds, with_experts, without)
    return charts.bits_per_byte(rounds, with_experts, without, metrics[-1]["order0_bits_per_byte"])


def _node_row(path: Path, audit: LedgerAudit) -> NodeRow:
    return NodeRow(path.stem.removeprefix("node-").lstrip("0") or "0", audit.ledger_id[:16], audit)
