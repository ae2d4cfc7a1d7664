"""Imports between our packages point one way; a lexical check of every import statement, wherever it stands."""

from __future__ import annotations

import ast
import re
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
ORDER = ("model", "privacy", "data", "clients", "server", "simulations", "deployment", "conclave")
MODEL_MAY_IMPORT = {*sys.stdlib_module_names, "torch", "pydantic", "safetensors", "model"}
FLOWERS_INSIDE = ("flwr.supercore", "flwr.superlink", "flwr.supernode", "flwr.proto", "flwr.cli", "flwr.server")
_INSIDE = tuple(f"{name}." for name in FLOWERS_INSIDE)
MAY_USE_IT = re.compile(r"deployment\.(flower_\w+|supernode)")


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
            names.add(ast.literal_eval(node.args[0]) if isinstance(node.args[0], ast.Constant) else "?dynamic")
        elif isinstance(node, ast.Call) and ast.unparse(node.func) == "__import__":
            names.add("?dynamic")
    return names


def violations(source: str, module: str) -> list[str]:
    package = module.split(".")[0]
    found = []
    for name in sorted(imported(source, module)):
        target = name.split(".")[0]
        if target == "?dynamic":
            found.append(f"{module} imports a computed name")
        elif target in ORDER and ORDER.index(target) > ORDER.index(package):
            found.append(f"{module} imports {name}, which lies to its right")
        elif package == "server" and target == "clients" and name.split(".")[:2] != ["clients", "protocol"]:
            found.append(f"{module} imports {name}, may import clients.protocol only")
        elif package == "model" and target not in MODEL_MAY_IMPORT:
            found.append(f"{module} imports {name}, may import torch, pydantic and safetensors only")
        elif package == "deployment" and not MAY_USE_IT.fullmatch(module) and f"{name}.".startswith(_INSIDE):
            found.append(f"{module} imports {name}, which only files may that are named after Flower")
    return found


def our_modules() -> list[tuple[str, Path]]:
    files = [ROOT / "conclave.py", *(f for package in ORDER[:-1] for f in (ROOT / package).rglob("*.py"))]
    return [(".".join(f.relative_to(ROOT).with_suffix("").parts), f) for f in sorted(files)]


def test_every_import_points_left():
    modules = our_modules()
    assert {name.split(".")[0] for name, _ in modules} == set(ORDER)
    assert [v for name, path in modules for v in violations(path.read_text(), name)] == []


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("model.routers", "import flwr"),
        ("model.routers", "from opacus import GradSampleModule"),
        ("model.routers", "def f():\n    import dp_accounting.rdp"),
        ("model.routers", "import numpy as np"),
        ("model.routers", "from privacy import dpsgd"),
        ("model.routers", "import torch, data.sources"),
        ("privacy.ledger", "from clients.protocol import Plan"),
        ("privacy.ledger", "try:\n    import data\nexcept ImportError:\n    pass"),
        ("data.sources", "from clients import protocol"),
        ("clients.node", "class A:\n    from server.scenario import Scenario"),
        ("clients.node", "import importlib\nimportlib.import_module('server.app')"),
        ("server.app", "from clients.node import Node"),
        ("server.app", "from clients import node"),
        ("server.app", "import clients"),
        ("server.app", "from simulations import simulate"),
        ("simulations.simulate", "if True:\n    from conclave import main"),
        ("deployment.node_process", "from flwr.supercore.fab import Fab"),
        ("deployment.node_process", "import flwr.proto.run_pb2"),
        ("server.app", "__import__('clients.node')"),
        ("model.routers", "from . import parameters\nfrom ..privacy import ledger"),
    ],
)
def test_the_checker_flags_a_bad_source(module, source):
    assert len(violations(source, module)) == 1


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("model.routers", "from __future__ import annotations\nimport math, torch\nfrom torch import nn"),
        ("model.routers", "from . import parameters\nfrom .errors import BadInputError"),
        ("privacy.dpsgd", "import opacus\nfrom model import Network"),
        ("server.app", "from clients.protocol import Plan\nfrom clients import protocol\nimport clients.protocol"),
        ("conclave", "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from server.scenario import Scenario"),
    ],
)
def test_the_checker_lets_a_good_source_pass(module, source):
    assert violations(source, module) == []
