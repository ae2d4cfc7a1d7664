"""A node's backup: complete, without the seeds of open charges, and what is restored from it."""

from __future__ import annotations

import errno
import os
import stat
import tarfile
from pathlib import Path

import pytest
from ledger_samples import request
from test_node_directory import make, spend  # noqa: F401  (a fixture)

from conclave.base.errors import BadInputError
from conclave.clients.approvals import Approvals
from conclave.clients.folder.backup import back_up
from conclave.clients.folder.node_directory import NodeDirectory
from conclave.privacy.ledger import ChargeAbandonedError, Reservation
from conclave.privacy.ledger.reading.history import LedgerFile
from conclave.privacy.ledger.reading.verification import audit_history
from conclave.report.budget import export_ledger

SEED = bytes(range(200, 232))


def unpack(backup, node: NodeDirectory) -> NodeDirectory:
    """Lose the node's disk, and put the backup onto another."""
    node.path.rename(node.path.with_name("lost"))
    with tarfile.open(backup) as archive:
        archive.extractall(node.path, filter="data")
    return NodeDirectory(node.path)


def test_a_node_goes_on_from_a_backup_and_loses_nothing(make, tmp_path):  # noqa: F811
    node = make(held_out=0.2)
    spend(node, 3)
    Approvals(node.plans).pause()
    names = back_up(node, tmp_path / "backup.tar")
    assert {"node.toml", "state/ledger.db", "state/held-out.db", "state/ledger.key", "state/node.key"} <= set(names)
    assert stat.S_IMODE((tmp_path / "backup.tar").stat().st_mode) == 0o600
    again = unpack(tmp_path / "backup.tar", node)
    assert Approvals(again.plans).paused
    spend(again, 2)  # the witness agrees: nothing has to be restored
    audit = audit_history(LedgerFile(again.training.path), witness=again.training.witness.read())
    assert (audit.findings, audit.charges) == ([], 5)


def test_what_was_spent_after_the_backup_is_found_out(make, tmp_path):  # noqa: F811
    node = make()
    spend(node, 2)
    back_up(node, tmp_path / "backup.tar")
    spend(node, 1)
    again = unpack(tmp_path / "backup.tar", node)
    with pytest.raises(BadInputError, match="its witness has seen entry"):
        again.open_ledger()
    assert not again.restore().proven
    assert again.open_ledger().epsilon_spent == pytest.approx(8.0, abs=1e-9)


def test_the_seed_of_work_that_is_going_on_is_in_no_copy(make, tmp_path):  # noqa: F811
    """With it, whoever reads the backup later could take the noise off what the server got."""
    node = make()
    ledger = node.open_ledger()
    assert isinstance(ledger.reserve(request(1), SEED), Reservation)
    state = b"".join(path.read_bytes() for path in node.state.glob("ledger.db*"))
    assert SEED in state  # the ledger itself has it until the output exists
    back_up(node, tmp_path / "backup.tar")
    assert SEED not in (tmp_path / "backup.tar").read_bytes()
    ledger.close()
    restored = unpack(tmp_path / "backup.tar", node).open_ledger()
    with pytest.raises(ChargeAbandonedError):  # its noise cannot be drawn again, so it stays spent
        restored.reserve(request(1), bytes(32))


def test_a_backup_is_a_new_file(make, tmp_path):  # noqa: F811
    node = make()
    (tmp_path / "backup.tar").write_text("mine")
    with pytest.raises(BadInputError, match="must be a new file"):
        back_up(node, tmp_path / "backup.tar")
    assert (tmp_path / "backup.tar").read_text() == "mine"


def test_only_decisions_are_taken_of_plans(make, tmp_path):  # noqa: F811
    node = make()
    node.plans.mkdir()
    for name in ("a.waiting", "b.approved", "b-1.run", "paused", "c.waiting.partial-7"):
        (node.plans / name).write_text(name)
    (node.plans / "folder").mkdir()
    (node.state / "ledger.key.partial-7").write_text("half a key")
    names = back_up(node, tmp_path / "backup.tar")
    assert {name for name in names if "plans" in name or "partial" in name} == {
        "state/plans/a.waiting", "state/plans/b.approved", "state/plans/b-1.run", "state/plans/paused",
    }  # fmt: skip


def test_a_plan_that_is_approved_meanwhile_is_in_the_backup(make, tmp_path, monkeypatch):  # noqa: F811
    node, read = make(), Path.read_bytes
    node.plans.mkdir()
    (node.plans / "a.waiting").write_text("plan")

    def approved_before_it_is_read(path):
        if path.name == "a.waiting":
            path.rename(path.with_suffix(".approved"))
        return read(path)

    monkeypatch.setattr(Path, "read_bytes", approved_before_it_is_read)
    names = back_up(node, tmp_path / "backup.tar")
    assert [name for name in names if "plans" in name] == ["state/plans/a.approved"]


@pytest.mark.parametrize("write", [back_up, lambda node, out: export_ledger(node.path, out)])
def test_a_full_disk_leaves_no_torn_file_in_the_way_of_the_next_try(make, tmp_path, monkeypatch, write):  # noqa: F811
    node, out = make(), tmp_path / "out"
    with monkeypatch.context() as patch:
        patch.setattr("os.fsync", full)
        with pytest.raises(BadInputError, match="No space left"):
            write(node, out)
    assert [path for path in tmp_path.iterdir() if path.name.startswith("out")] == []
    write(node, out)
    assert stat.S_IMODE(out.stat().st_mode) == 0o600
    content = out.read_bytes()
    with pytest.raises(BadInputError, match="must be a new file"):
        write(node, out)
    assert out.read_bytes() == content


def full(descriptor):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
