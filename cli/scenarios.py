"""What a scenario is and will cost, before anything runs: ``plan``, ``model``, ``scenarios``."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from conclave.cli.options import Json, Overrides, scenario_of
from conclave.cli.output import print_json, warn_of_budget


def plan(
    scenario: Annotated[str, typer.Argument(help="A shipped scenario's name, or a .toml file.")],
    overrides: Overrides = None,
    as_json: Json = False,
) -> None:
    """Show what a scenario will cost before anything runs: noise, epsilon, bytes, steps, expected time."""
    resolved = scenario_of(scenario, overrides or [], None)

    from conclave.report.tables import print_plan
    from conclave.simulations.estimate import estimate_simulated as work_out

    estimate = work_out(resolved)
    print_plan(estimate)
    warn_of_budget(resolved)
    if as_json:
        print_json(asdict(estimate))


def model(
    scenario: Annotated[str, typer.Argument(help="A shipped scenario's name, or a .toml file.")],
    overrides: Overrides = None,
    plot: Annotated[Path | None, typer.Option(help="Draw who holds which experts to this .svg file.")] = None,
    as_json: Json = False,
) -> None:
    """Show a scenario's model: parameters, active ones and operations for a token, traffic, who holds what."""
    from conclave.report.model_card import model_card
    from conclave.report.tables import print_model_card

    card = model_card(scenario_of(scenario, overrides or [], None), plot)
    print_model_card(card)
    if as_json:
        print_json(card)


def scenarios(as_json: Json = False) -> None:
    """List the scenarios that come with Conclave."""
    from conclave.server.scenario import read_scenario
    from conclave.simulations.shipped import shipped

    found = {name: read_scenario(path) for name, path in shipped().items()}
    for name, item in found.items():
        typer.echo(f"{name:<16} {item.description}")
    if as_json:
        print_json({"scenarios": {name: item.description for name, item in found.items()}})
