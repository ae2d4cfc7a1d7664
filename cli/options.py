"""Options and arguments that several commands take, and what is made of them."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from conclave.base.errors import BadInputError

if TYPE_CHECKING:
    from conclave.server.scenario import Scenario

LARGEST_ID = 2**64 - 1
"""Of Flower's nodes and runs."""

Overrides = Annotated[
    list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Override a key, e.g. privacy.epsilon=3.")
]
Json = Annotated[bool, typer.Option("--json", help="End with one JSON object on a line of its own.")]
NodeFolder = Annotated[Path, typer.Argument(metavar="NODE", help="The node's folder, which holds node.toml.")]
ServiceUser = Annotated[str, typer.Option("--user", help="Whom the process runs as.")]
SuperLink = Annotated[str, typer.Option("--superlink", help="An operator's folder, or its name in ~/.config/conclave.")]


def scenario_of(name: str, overrides: list[str], seed: int | None) -> Scenario:
    """Read the scenario that a command names, by a shipped name or a path.

    Raises:
        BadInputError: there is none, or an override or what comes of it is not allowed.
    """
    from conclave.server.scenario import parse_override, read_scenario
    from conclave.simulations.shipped import find

    changes = dict(parse_override(text) for text in overrides)
    if seed is not None:
        changes["seed"] = seed
    return with_own_code(read_scenario(find(name), changes))


def with_own_code(scenario: Scenario) -> Scenario:
    """Let a scenario's own model be found where the caller is."""
    if scenario.model.source is not None:
        sys.path.append(str(Path.cwd()))
    return scenario


def refuse_arguments_that_say_nothing(arguments: list[str]) -> None:
    """Refuse what no document could hold and no terminal show; and what is empty: as a path it is the folder here."""
    for place, argument in enumerate(arguments, start=1):
        if not argument or (argument.startswith("--") and argument.find("=") == len(argument) - 1):
            name = argument or f"argument {place}"
            raise BadInputError(f"{name}: is empty, must be a value; perhaps a variable of the shell is not set")
    try:
        "\n".join(arguments).encode()
    except UnicodeEncodeError as error:
        strange = next(argument for argument in arguments if error.object[error.start] in argument)
        raise BadInputError(f"argument {strange!r}: is no text in UTF-8, must be one") from error
