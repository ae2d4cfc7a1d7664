"""Imports between our folders point one way; a lexical check of every import statement, wherever it stands."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections import defaultdict
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

from conclave.protocol.code_identity import FOLDERS

ROOT = Path(__file__).resolve().parent.parent
ORDER = (
    "base", "model", "privacy", "data", "protocol", "clients", "server", "simulations", "audit", "report", "api",
    "deployment", "cli",
)  # fmt: skip
STANDARD = set(sys.stdlib_module_names)
MAY_IMPORT = {
    "base": STANDARD | {"pydantic"},
    "model": STANDARD | {"pydantic", "torch", "safetensors"},
}
"""What the lowest folders may import besides our own."""
FLOWERS_INSIDE = ("flwr.supercore", "flwr.superlink", "flwr.supernode", "flwr.proto", "flwr.cli", "flwr.server")
_INSIDE = tuple(f"{name}." for name in FLOWERS_INSIDE)
MAY_USE_IT = re.compile(r"conclave\.deployment\.(flower\.\w+|\w+\.flower_\w+)")
MOST_FILES = 15


def imported(source: str, module: str) -> set[str]:
    """Dotted names that a module imports; ``from a import b`` counts as ``a.b``."""
    names = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:  # relative: resolve against the package of the module
                parents = module.split(".")[: -node.level]
                base = ".".join([*parents, *([base] if base else [])])
            names |= {f"{base}.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.Call) and ast.unparse(node.func) in {"import_module", "importlib.import_module"}:
            names.add(node.args[0].value if isinstance(node.args[0], ast.Constant) else "?dynamic")
        elif isinstance(node, ast.Call) and ast.unparse(node.func) == "__import__":
            names.add("?dynamic")
    return names


def named_in_text(source: str) -> set[str]:
    """Our modules and folders that strings name, as a module to run or a part of a path; docstrings are prose."""
    tree = ast.parse(source)
    bodies = [node.body for node in ast.walk(tree) if isinstance(getattr(node, "body", None), list)]
    prose = {id(line.value) for body in bodies for line in body if isinstance(line, ast.Expr)}
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Div):
            for side in (node.left, node.right):
                if isinstance(side, ast.Constant) and side.value in ORDER and "__file__" in ast.unparse(node):
                    names.add(f"conclave.{side.value}")
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in prose:
            names |= set(re.findall(rf"\bconclave\.(?:{'|'.join(ORDER)})(?:\.\w+)*", node.value))
    return names


def violations(source: str, module: str) -> list[str]:
    folder = module.split(".")[1]
    found = []
    for name in sorted(imported(source, module) | named_in_text(source)):
        top, _, rest = name.partition(".")
        target = rest.split(".")[0]
        if name == "?dynamic":
            found.append(f"{module} imports a computed name")
        elif top in ORDER:
            found.append(f"{module} imports {name}, must be conclave.{name}")
        elif top == "conclave" and target in ORDER and ORDER.index(target) > ORDER.index(folder):
            found.append(f"{module} names {name}, which lies to its right")
        elif top == "conclave" and folder == "server" and target == "clients":
            found.append(f"{module} imports {name}: what a server knows of nodes is in conclave.protocol")
        elif top != "conclave" and top not in MAY_IMPORT.get(folder, {top}):
            found.append(f"{module} imports {name}, may import {', '.join(sorted(MAY_IMPORT[folder] - STANDARD))} only")
        elif folder == "deployment" and not MAY_USE_IT.fullmatch(module) and f"{name}.".startswith(_INSIDE):
            found.append(f"{module} imports {name}, which only files may that are named after Flower")
    return found


def our_modules() -> dict[str, Path]:
    files = [file for folder in ORDER for file in (ROOT / folder).rglob("*.py")]
    return {".".join(("conclave", *file.relative_to(ROOT).with_suffix("").parts)): file for file in sorted(files)}


def test_every_import_points_left():
    modules = our_modules()
    assert {name.split(".")[1] for name in modules} == set(ORDER)
    assert [v for name, path in modules.items() for v in violations(path.read_text(), name)] == []


def test_no_way_through_the_rooms_goes_back_up():
    """Between folders, the rooms in them included, imports form no circle; nor do they between files."""
    modules = our_modules()
    of_rooms: dict[str, set[str]] = defaultdict(set)
    of_files: dict[str, set[str]] = defaultdict(set)
    for name, path in modules.items():
        for other in imported(path.read_text(), name):
            target = next((n for n in (other, f"{other}.__init__", other.rpartition(".")[0]) if n in modules), None)
            target = target or f"{other.rpartition('.')[0]}.__init__"
            if target in modules and target != name:
                of_files[name].add(target)
                if (here := name.rpartition(".")[0]) != (there := target.rpartition(".")[0]):
                    of_rooms[here].add(there)
    assert len(tuple(TopologicalSorter(of_files).static_order())) > 200  # raises CycleError, which names the circle
    assert len(tuple(TopologicalSorter(of_rooms).static_order())) > 20


def test_the_code_that_a_charge_names_is_all_that_a_node_answers_with():
    """More would make nodes give up interrupted charges for nothing; less, repeat them with other code."""
    modules, reached, waiting = our_modules(), set(), ["conclave.clients.app"]
    while waiting:
        name = waiting.pop()
        for other in imported(modules[name].read_text(), name):
            found = next((n for n in (other, other.rpartition(".")[0]) if n in modules), None)
            if found is not None and found not in reached:
                reached.add(found)
                waiting.append(found)
    assert {name.split(".")[1] for name in reached} == set(FOLDERS)


@pytest.mark.parametrize("folder", [*ORDER, "tests", "docs", "benchmarks"])
def test_no_folder_holds_more_files_than_one_can_keep_in_mind(folder):
    folders = [ROOT / folder, *(f for f in (ROOT / folder).rglob("*") if f.is_dir() and f.name != "__pycache__")]
    counts = {
        str(f.relative_to(ROOT)): sum(g.is_file() and g.name != "__init__.py" for g in f.iterdir()) for f in folders
    }
    assert {name: count for name, count in counts.items() if count > MOST_FILES} == {}


@pytest.mark.parametrize("module", ["conclave.privacy.ledger.reading.verification", "conclave.base.errors"])
def test_who_reads_a_ledger_loads_no_torch_and_nothing_that_prices(module):
    heavy = {"torch", "opacus", "flwr", "dp_accounting", "scipy"}
    code = f"import sys, {module}; print(sorted({heavy} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout == "[]\n"


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("conclave.base.errors", "import torch"),
        ("conclave.model.network", "import flwr"),
        ("conclave.model.network", "from opacus import GradSampleModule"),
        ("conclave.model.network", "def f():\n    import dp_accounting.rdp"),
        ("conclave.model.network", "import numpy as np"),
        ("conclave.model.network", "from conclave.privacy import randomness"),
        ("conclave.model.network", "from model import config"),
        ("conclave.model.network", "import torch, conclave.data.sources"),
        ("conclave.privacy.ledger", "from conclave.protocol.plan import Plan"),
        ("conclave.privacy.ledger", "try:\n    import conclave.data\nexcept ImportError:\n    pass"),
        ("conclave.privacy.ledger", "from pathlib import Path\nSIDE = Path(__file__).parent / 'simulations'"),
        ("conclave.data.sources", "from conclave.clients import node"),
        ("conclave.clients.node", "class A:\n    from conclave.server.scenario import Scenario"),
        ("conclave.clients.node", "import importlib\nimportlib.import_module('conclave.server.app')"),
        ("conclave.clients.node", "COMMAND = ['-m', 'conclave.server.app']"),
        ("conclave.server.app", "from conclave.clients.node import Node"),
        ("conclave.server.app", "from conclave.clients import node"),
        ("conclave.server.app", "import conclave.clients"),
        ("conclave.server.app", "from conclave.simulations import simulate"),
        ("conclave.server.app", "from conclave.api.run import Run"),
        ("conclave.api.run", "from conclave.deployment.health import ask_health"),
        ("conclave.simulations.simulate", "if True:\n    from conclave.cli.main import main"),
        ("conclave.deployment.node.process", "from flwr.supercore.fab import Fab"),
        ("conclave.deployment.node.process", "import flwr.proto.run_pb2"),
        ("conclave.server.app", "__import__('conclave.clients.node')"),
        ("conclave.model.network", "from . import parameters\nfrom ..privacy import ledger"),
    ],
)  # fmt: skip
def test_the_checker_flags_a_bad_source(module, source):
    assert violations(source, module)


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("conclave.model.network", "from __future__ import annotations\nimport math, torch\nfrom torch import nn"),
        ("conclave.model.network", "from . import parameters\nfrom ..base.errors import BadInputError"),
        ("conclave.privacy.dpsgd", "import opacus\nfrom conclave.model.network import Network"),
        ("conclave.server.app", "from conclave.protocol.plan import Plan\nfrom conclave.protocol import plan"),
        ("conclave.cli.main", "from typing import Any\nif Any:\n    from conclave.server.scenario import Scenario"),
        ("conclave.privacy.ledger", '"""Prose about :mod:`conclave.clients.node`."""'),
    ],
)
def test_the_checker_lets_a_good_source_pass(module, source):
    assert violations(source, module) == []
