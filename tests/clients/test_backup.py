"""A node's backup: complete, without the seeds of open charges, and what is restored from it."""

from __future__ import annotations

import stat
import tarfile

import pytest
from ledger_samples import request
from test_node_directory import make, spend  # noqa: F401  (a fixture)

from clients.approvals import Approvals
from clients.backup import back_up
from clients.node_directory import NodeDirectory
from model.errors import BadInputError
from privacy.ledger import ChargeAbandonedError, Reservation
from privacy.ledger.reading import LedgerFile
from privacy.ledger.verification import audit_history

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
