"""What commands print besides their tables: the JSON object at the end, warnings, and progress."""

from __future__ import annotations

import json
import math
from typing import TYPE_CHECKING, Any

import typer

if TYPE_CHECKING:
    from conclave.server.scenario import Scenario


def print_json(document: Any) -> None:
    """Print one JSON object on a line of its own: a mapping, or a document that has a published schema."""
    if not isinstance(document, dict):
        from conclave.report.schemas import to_json

        document = to_json(document)
    typer.echo(json.dumps(_spelled(document), allow_nan=False))


def _spelled(value: Any) -> Any:
    """Spell what JSON has no number for: infinity as the ledger does, and what a model that diverged comes to."""
    if isinstance(value, dict):
        return {key: _spelled(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_spelled(item) for item in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def warn_of_budget(scenario: Scenario) -> None:
    """Say on stderr why a simulated scenario's budget protects little, if it does."""
    from conclave.simulations.estimate import budget_doubts

    for doubt in budget_doubts(scenario):
        typer.echo(f"warning: {doubt}; a real node of that size would refuse or warn", err=True)


class progress:  # noqa: N801  (used like a function)
    """A progress bar over rounds, shown on a terminal only."""

    def __init__(self, rounds: int) -> None:
        from rich.console import Console
        from rich.progress import Progress

        console = Console(stderr=True)
        self._bar = Progress(console=console, disable=not console.is_terminal, transient=True)
        self._task = self._bar.add_task("rounds", total=rounds)

    def __enter__(self) -> Any:
        """Show it; return what is called with the number of the round that is done."""
        self._bar.__enter__()
        return lambda round_number: self._bar.update(self._task, completed=round_number)

    def __exit__(self, *error: object) -> None:
        """Take it away."""
        self._bar.__exit__(*error)  # type: ignore[arg-type]
