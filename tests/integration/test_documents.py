"""What the documents show works as shown."""

from __future__ import annotations

import json
import re
import shlex
import tomllib
from pathlib import Path

import click
import pytest
import typer
from format_samples import FORMAT, SAMPLES

import conclave.cli.main
from conclave.model.config import ModelConfig
from conclave.model.costs import costs_of
from conclave.server.scenario import read_scenario
from conclave.simulations.shipped import find

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
    command, arguments = typer.main.get_command(conclave.cli.main.app), shlex.split(line)[1:]
    assert arguments
    with command.make_context("conclave", arguments) as context:
        while isinstance(command, click.Group):
            name, command, arguments = command.resolve_command(context, [*context._protected_args, *context.args])
            context = command.make_context(name, arguments, parent=context)


def test_the_example_of_private_training_runs(capsys):
    (example,) = re.findall(r"```python\n(.*?)```", (DOCS / "private-training.md").read_text(), re.DOTALL)
    exec(compile(example, "private-training.md", "exec"), {})
    assert "'rdp'" in capsys.readouterr().out


def test_the_formats_that_are_shown_are_all_there_are_and_valid():
    examples = re.findall(r"```toml\n(.*?)```", (DOCS / "data.md").read_text(), re.DOTALL)
    formats = [tomllib.loads(example)["format"] for example in examples]
    assert {FORMAT.validate_json(json.dumps(shown)).kind for shown in formats} == {
        name.split(",")[0] for name in SAMPLES
    }


def test_the_model_that_is_shown_can_be_built():
    (example,) = re.findall(r"```toml\n(.*?)```", (DOCS / "models.md").read_text(), re.DOTALL)
    base = read_scenario(find("stdlib-text")).model.model_dump(mode="json", exclude_none=True)
    shown = tomllib.loads(example)["model"]
    config = ModelConfig.model_validate_json(json.dumps(base | shown | {"experts": base["experts"] | shown["experts"]}))
    assert costs_of(config).total > 0
