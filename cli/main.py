"""The command line: all commands by name, and how it ends.

Heavy libraries are imported inside the commands that need them, so that ``conclave --help`` answers at once; those of
training once a command's input has been read, so that a misspelt scenario does not wait for them either.
"""

from __future__ import annotations

import io
import logging
import sys
from typing import Annotated

import typer

from conclave.cli import audit, node_ledger, node_running, server
from conclave.cli.exit_status import SAID, say, sentence_of, status_of
from conclave.cli.operating import health, status, stop, train
from conclave.cli.options import refuse_arguments_that_say_nothing
from conclave.cli.runs import predict, report, schema
from conclave.cli.scenarios import model, plan, scenarios
from conclave.cli.simulate import simulate

app = typer.Typer(
    help="Train mixture-of-experts models across organisations, under differential privacy.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
for _command in (simulate, plan, model, scenarios, report, predict, health, train, status, stop, schema):
    app.command()(_command)

_node = typer.Typer(help="Keep a node: its ledger, its budget, its keys.", no_args_is_help=True)
_node.add_typer(node_ledger.app)
_node.add_typer(node_running.app)

app.add_typer(audit.app, name="audit")
app.add_typer(_node, name="node")
app.add_typer(server.app, name="server")


@app.callback(invoke_without_command=True)
def _version(
    version: Annotated[bool, typer.Option("--version", help="Print the version and exit.")] = False,
) -> None:
    refuse_arguments_that_say_nothing(sys.argv[1:])
    if version:
        from importlib.metadata import version as installed_version

        typer.echo(f"conclave {installed_version('conclave-moe')}")
        raise typer.Exit


def main() -> None:
    """Run the command line, and end with its status: :class:`conclave.cli.exit_status.ExitStatus`."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # what a terminal has no character for is spelled out, not fatal
            stream.reconfigure(errors="backslashreplace")
    logging.basicConfig(level=logging.WARNING, format="%(name)s: %(message)s")
    try:
        app()
    except SAID as error:
        say(sentence_of(error))
        sys.exit(status_of(error))


if __name__ == "__main__":
    main()
