"""Every exception that Conclave defines is in the one tree that ``base/errors.py`` draws, and the drawing is true."""

from __future__ import annotations

import ast
import builtins
import re
from functools import cache
from pathlib import Path

import conclave.base.errors
from conclave.base.errors import BadInputError, ConclaveError, RunFailedError
from conclave.clients.node_ledger import CODE_OF
from conclave.privacy.ledger import LedgerError
from conclave.protocol.messages import CODES

ROOT = Path(__file__).resolve().parents[2]
FOLDERS = [path for path in (ROOT / "src" / "conclave").iterdir() if path.is_symlink()]
SYSTEMS = {
    name for name, value in vars(builtins).items() if isinstance(value, type) and issubclass(value, BaseException)
}


@cache
def defined() -> dict[str, tuple[str, list[str]]]:
    """Name → file and bases of every exception class in the product, found without importing anything."""
    classes = {}
    for folder in FOLDERS:
        for path in sorted(folder.resolve().rglob("*.py")):
            for node in ast.walk(ast.parse(path.read_text())):
                if isinstance(node, ast.ClassDef):
                    bases = [ast.unparse(base).rpartition(".")[2] for base in node.bases]
                    classes[node.name] = (path.relative_to(ROOT).as_posix(), bases)
    found: set[str] = set()
    while more := {name for name, (_, bases) in classes.items() if (SYSTEMS | found) & set(bases)} - found:
        found |= more
    return {name: classes[name] for name in sorted(found)}


def drawn() -> dict[str, tuple[str, list[str]]]:
    """The same as the docstring draws it."""
    found, above = {}, {}
    (drawing,) = re.findall(
        r"^    ConclaveError\n(?:    [│├└ ].*\n)+", conclave.base.errors.__doc__ or "", re.MULTILINE
    )
    for line in drawing.splitlines():
        head, name, notes = re.fullmatch(r"    ([│├└─ ]*)(\w+)\s*(.*)", line).groups()
        depth = len(head) // 4
        above[depth] = name
        file, _, also = notes.removeprefix("also a ").partition(", also a ") if "/" in notes else ("", "", notes)
        parents = [above[depth - 1]] if depth else ["Exception"]
        also = [also.removeprefix("also a ")] if also else []
        found[name] = (file or "base/errors.py", [*parents, *also])
    return found


def test_the_drawing_is_the_tree():
    assert defined() == dict(sorted(drawn().items()))


def test_every_exception_derives_from_the_root():
    tree = defined()
    assert len(tree) > 10

    def ancestors(name: str) -> set[str]:
        return {name}.union(*(ancestors(base) for base in tree.get(name, ("", []))[1]))

    assert [name for name in tree if "ConclaveError" not in ancestors(name)] == []


def test_whoever_caught_them_before_still_does():
    assert issubclass(BadInputError, ValueError)  # pydantic takes nothing else for a refusal
    assert issubclass(RunFailedError, RuntimeError)
    assert issubclass(LedgerError, ConclaveError)


def test_every_refusal_of_a_ledger_has_a_code():
    """And a sentence for the node's log."""
    kinds = {kind for kind in LedgerError.__subclasses__() if kind.__module__.startswith("conclave.")}
    assert CODE_OF.keys() == kinds
    assert set(CODE_OF.values()) <= set(CODES)
    assert all(str(kind()) and not kind.__subclasses__() for kind in kinds)
