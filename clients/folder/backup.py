"""A backup of a node: what is needed to go on with it on another disk, without its data."""

from __future__ import annotations

import io
import tarfile
from collections.abc import Iterator
from pathlib import Path

from conclave.base.errors import BadInputError
from conclave.base.whole_file import new_file
from conclave.clients.folder.node_directory import NodeDirectory
from conclave.privacy.ledger.upkeep.recovery import copy_without_secrets

# In this order: where a file takes another one's name meanwhile, what it becomes is looked for after it.
_KEPT = (
    "*.key.next", "*.key", "*.key.pub", "*.layout", "*.claims", "plans/*.waiting", "plans/*.approved", "plans/*.run",
    "plans/paused",
)  # fmt: skip


def back_up(directory: NodeDirectory, out: Path) -> list[str]:
    """Write a tar file that its owner alone can read; return what is in it.

    ``node.toml``, ledgers, keys, and what the owner approved; paths are relative to the node's folder, and a state that
    lies outside it is under ``state``. The node may keep running meanwhile. What it spends later is not in the
    backup: see :mod:`conclave.privacy.ledger.upkeep.recovery`.

    Raises:
        BadInputError: the file exists or cannot be written, or a ledger cannot be read.
    """
    contents = {"node.toml": (directory.path / "node.toml").read_bytes()}
    state = directory.config.storage.state
    folder = "state" if state.is_absolute() or ".." in state.parts else state.as_posix()
    for side in directory.sides:
        ledger = directory.files(side).path
        contents[f"{folder}/{ledger.name}"] = copy_without_secrets(ledger)
    for name, content in _kept(directory.state):
        contents[f"{folder}/{name}"] = content
    try:
        with new_file(out, mode=0o600) as stream, tarfile.open(fileobj=stream, mode="w") as archive:
            for name, content in contents.items():
                entry = tarfile.TarInfo(name)
                entry.size, entry.mode = len(content), 0o600
                archive.addfile(entry, io.BytesIO(content))
    except OSError as error:
        raise BadInputError(f"{out}: cannot be written ({error.strerror}), must be a new file") from error
    return list(contents)


def _kept(state: Path) -> Iterator[tuple[str, bytes]]:
    """Yield name and content of the files next to the ledgers; a running node may rename or drop plans meanwhile."""
    for pattern in _KEPT:
        for path in state.glob(pattern):
            try:
                content = path.read_bytes()
            except FileNotFoundError:
                continue
            yield path.relative_to(state).as_posix(), content
