"""Modules that no test names: what they do is tested through others, if at all. Printed by ``make coverage``."""

from __future__ import annotations

import ast
import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def named_in(source: str) -> set[str]:
    """Dotted names of ours that a test imports, or that its strings name."""
    names = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            for found in re.findall(r"\bconclave(?:\.\w+)+", node.value):
                parts = found.split(".")
                names |= {".".join(parts[:length]) for length in range(2, len(parts) + 1)}
    return names


def untested() -> dict[str, int]:
    """Return the modules, and how many lines they have."""
    named = set().union(*(named_in(test.read_text()) for test in (ROOT / "tests").rglob("*.py")))
    found = {}
    for folder in (ROOT / "src" / "conclave").iterdir():
        for path in folder.resolve().rglob("*.py") if folder.is_dir() else ():
            name = ".".join(("conclave", *path.relative_to(ROOT).with_suffix("").parts))
            if path.name != "__init__.py" and name not in named:
                found[name] = path.read_text().count("\n")
    return found


if __name__ == "__main__":
    modules = untested()
    print(f"{len(modules)} modules that no test names, and their lines:")
    for name, lines in sorted(modules.items(), key=lambda item: -item[1]):
        print(f"{lines:5}  {name}")
