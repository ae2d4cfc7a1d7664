"""What the product imports is declared, what is declared is imported, and every range holds its tested version."""

from __future__ import annotations

import ast
import re
import sys
import tomllib
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
EXTRAS = PROJECT["optional-dependencies"]
PINS = {
    canonicalize_name(name): version
    for name, version in re.findall(r"^([\w.-]+)==(\S+)$", (ROOT / "constraints.txt").read_text(), re.MULTILINE)
}
LOCKED = (ROOT / "requirements-dev.lock").read_text()
ONLY_WITH = {"ray": "flwr"}
"""Imported where an extra of the distribution on the right was asked for."""


def names(requirements: list[str]) -> set[str]:
    return {canonicalize_name(Requirement(line).name) for line in requirements}


def third_parties(source: str) -> set[str]:
    """The top-level names that a module imports, wherever in it, besides Python's own and ours."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and not node.level and node.module:
            found.add(node.module.partition(".")[0])
    return found - set(sys.stdlib_module_names) - {"conclave"}


def imported() -> dict[str, set[str]]:
    """Distributions that the product imports from, and where."""
    distributions, found = packages_distributions(), {}
    for folder in (ROOT / "src" / "conclave").iterdir():
        for path in [folder] if folder.suffix == ".py" else folder.resolve().rglob("*.py"):
            for name in third_parties(path.read_text()):
                for distribution in {ONLY_WITH.get(d, d) for d in distributions.get(name, [name])}:
                    found.setdefault(canonicalize_name(distribution), set()).add(path.name)
    return found


def test_what_is_imported_is_declared_and_nothing_else():
    must, declared = imported(), names(PROJECT["dependencies"])
    assert {name: where for name, where in must.items() if name not in declared} == {}
    assert declared - must.keys() == set()


@pytest.mark.parametrize(
    ("source", "found"),
    [
        ("import os, httpx", {"httpx"}),
        ("def f():\n    from google.protobuf import message", {"google"}),
        ("from . import toml\nfrom conclave.base import errors\nfrom __future__ import annotations", set()),
    ],
)
def test_the_checker_sees_imports_wherever_they_stand(source, found):
    assert third_parties(source) == found


@pytest.mark.parametrize(
    "line", [*PROJECT["dependencies"], *(line for extra in EXTRAS.values() for line in extra)], ids=lambda line: line
)
def test_every_range_holds_the_version_that_is_tested(line):
    requirement = Requirement(line)
    if canonicalize_name(requirement.name) != PROJECT["name"]:  # an extra that takes another along
        assert requirement.specifier.contains(PINS[canonicalize_name(requirement.name)])


def test_the_lock_holds_every_tested_version_but_torch_with_hashes_and_says_not_where_from():
    locked = re.findall(r"^([\w.-]+)==(\S+) \\\n((?: {4}--hash=sha256:[0-9a-f]{64}(?: \\)?\n)+)", LOCKED, re.MULTILINE)
    versions = {canonicalize_name(name): version for name, version, _ in locked}
    assert versions == {name: version for name, version in PINS.items() if name != "torch"}
    comments = [line for line in LOCKED.splitlines() if line.startswith("#")]
    assert len(LOCKED.splitlines()) == len(comments) + sum(1 + hashes.count("\n") for _, _, hashes in locked)
    assert not any("/" in line or "-" in line for line in comments)
