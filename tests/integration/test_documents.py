"""What the documents show works as shown."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import click
import pytest
import typer

import conclave

ROOT = Path(__file__).resolve().parents[2]
DOCS = ROOT / "docs"


def commands() -> list[str]:
    """Every line of a document that calls the command line, without its comment."""
    found = []
    for path in (ROOT / "README.md", *sorted(DOCS.glob("*.md"))):
        text = path.read_text().replace("\\\n", " ")
        found += re.findall(r"^(conclave [^#\n]*)", text, re.MULTILINE)
    return found


@pytest.mark.parametrize("line", commands())
def test_the_commands_that_are_shown_can_be_parsed(line):
    """Parsed by the very command line, not run: names, arguments and options exist."""
    command, arguments = typer.main.get_command(conclave.app), shlex.split(line)[1:]
    assert arguments
    with command.make_context("conclave", arguments) as context:
        while isinstance(command, click.Group):
            name, command, arguments = command.resolve_command(context, [*context._protected_args, *context.args])
            context = command.make_context(name, arguments, parent=context)


def test_the_example_of_private_training_runs(capsys):
    (example,) = re.findall(r"```python\n(.*?)```", (DOCS / "private-training.md").read_text(), re.DOTALL)
    exec(compile(example, "private-training.md", "exec"), {})
    assert "'rdp'" in capsys.readouterr().out
