"""Keys that nobody enrolled, and one key in two places: who gets in, and whose budget pays."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from federation import NODES, Federation
from soaking import add_node, balanced, begin, connected, start_again, start_in_vain

from conclave.privacy.ledger.reading.history import LedgerFile

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def fourth(wired) -> str:
    """A node that nobody enrolled."""
    add_node(wired[0], "fourth", like="first")
    return "fourth"


def entries(federation: Federation, name: str) -> int:
    return LedgerFile(federation.folder / name / "state" / "ledger.db").head.seq


def copy_of(federation: Federation, name: str, to: str) -> Path:
    return Path(shutil.copytree(federation.folder / name, federation.folder / to))


def test_a_key_that_nobody_enrolled_is_not_let_in(federation, fourth):
    before = federation.status()["nodes"]
    start_in_vain(federation, fourth)
    assert federation.status()["nodes"] == before
    federation.end(fourth)
    assert entries(federation, fourth) == 0


def test_a_copied_folder_does_not_open_elsewhere_nor_once_the_original_went_on(federation):
    copy_of(federation, "first", "moved")
    federation.edit_node("moved", 'machine = "loopback"', 'machine = "elsewhere"')
    copy_of(federation, "first", "cloned")  # the machine's name, too, and the way to the witness
    assert begin(federation, "copied", 1).end() == 0
    for name in ("moved", "cloned"):  # where nobody knows of the original, machine or witness tells: the ledger's tests
        start = federation.begin("node", "start", name)
        assert start.end() == 2
        assert "is a copy of" in start.said.splitlines()[-1]
        assert "Traceback" not in start.said
        check = federation.call("node", "check", name)
        assert check.returncode == 1
        assert "is a copy of" in check.stdout
    assert balanced(federation, "copied-1") == {name: {1: 1} for name in NODES}


def test_of_two_nodes_with_one_key_the_first_that_came_is_there_and_each_ledger_pays_for_its_own(federation, fourth):
    """The key says who may connect; the ledger's key says who it is."""
    for name in ("node.key", "node.key.pub"):
        shutil.copy2(federation.folder / "first" / "state" / name, federation.folder / "fourth" / "state")
    start_in_vain(federation, fourth)
    assert begin(federation, "both", 1).end() == 0
    assert balanced(federation, "both-1") == {name: {1: 1} for name in NODES}
    assert entries(federation, fourth) == 0
    before = entries(federation, "first")
    federation.end("first")
    federation.wait_for("the other", lambda: connected(federation, fourth), 90)
    federation.wait_for_nodes(NODES)
    assert begin(federation, "other", 1).end() == 0
    now = (fourth, "second", "third")
    assert balanced(federation, "other-1", now) == {name: {1: 1} for name in now}
    assert entries(federation, "first") == before
    federation.end(fourth)
    start_again(federation, "first")
    federation.wait_for("the first", lambda: connected(federation, "first"), 90)


def test_nothing_is_left_behind(federation):
    for name in ("first", "second", "third", "fourth", "server"):
        assert "Traceback" not in federation.log(name)
