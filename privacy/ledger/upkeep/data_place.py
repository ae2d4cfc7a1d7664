"""Where data lie, judged by which files are there: links, other mounts and other spellings lead to the same files.

What a file is known by (device and number) is the file system's; nothing here is read from what files hold but
:func:`fingerprint`, which must not leave its owner's machine.
"""

from __future__ import annotations

import hashlib
import os
import stat
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from conclave.base.errors import BadInputError
from conclave.privacy.ledger.upkeep.birth_time import birth_time

_CHUNK = 1 << 20


@dataclass(frozen=True)
class DataPlace:
    """A file, or a folder and all that can be reached from it.

    path: absolute, without links.
    files: device and number → path, of files that hold anything and of folders. Links are followed, as readers do.
    known: of files, ``DEVICE:NUMBER`` → size, time of the last change, and of creation if the file system records it.
        Numbers are given anew once a file is gone: who was born at the same time, or is of the same size and not
        changed since, is the same file under another name.
    """

    path: Path
    files: Mapping[tuple[int, int], Path]
    known: Mapping[str, str]

    def shared_with(self, other: DataPlace) -> Path | None:
        """Return a file or folder of this place that the other one also has; None if there is none."""
        return next((path for known_by, path in self.files.items() if known_by in other.files), None)

    def seen_in(self, known: Mapping[str, str]) -> bool:
        """Whether a file here was at another place when that was looked at."""
        return any(_is_same(known[number], state) for number, state in self.known.items() if number in known)

    def is_still(self, other: DataPlace) -> bool:
        """Whether the same place was looked at again, and the same files are there."""
        return self.path == other.path and self.files.keys() == other.files.keys()


def look_at(data: Path) -> DataPlace:
    """Look at what is at a place. What is missing, or cannot be read, is left out: nobody can train on it."""
    path = data.resolve()
    files: dict[tuple[int, int], Path] = {}
    known: dict[str, str] = {}
    for found, status in _reachable(path):
        known_by = (status.st_dev, status.st_ino)
        if stat.S_ISREG(status.st_mode):
            if not status.st_size:
                continue
            state = (status.st_size, status.st_mtime_ns, birth_time(found) or "")
            known[f"{status.st_dev}:{status.st_ino}"] = ":".join(map(str, state))
        files[known_by] = found
    return DataPlace(path, files, known)


def _is_same(then: str, now: str) -> bool:
    """Whether two states are of one file; earlier releases did not record when it was created."""
    *changed, born = (*then.split(":"), "")[:3]
    *changed_now, born_now = now.split(":")
    return born == born_now if born and born_now else changed == changed_now


def fingerprint(data: Path) -> str:
    """Return 32 hexadecimal digits computed from the content of the files at a place, whatever their names.

    For the owner, who knows by it that two nodes have the same data. It is a function of private data: shown on the
    owner's terminal, and neither stored, logged nor sent.

    Raises:
        BadInputError: a file cannot be read.
    """
    each = []
    for path in look_at(data).files.values():
        if path.is_file():
            try:
                each.append(_digest(path))
            except OSError as error:
                raise BadInputError(f"{path}: cannot be read ({error.strerror}), must be part of the data") from error
    return hashlib.sha256(b"".join(sorted(each))).hexdigest()[:32]


def _digest(path: Path) -> bytes:
    digest = hashlib.sha256()
    with path.open("rb") as stream:
        while chunk := stream.read(_CHUNK):
            digest.update(chunk)
    return digest.digest()


def _reachable(path: Path) -> Iterator[tuple[Path, os.stat_result]]:
    """Yield files and folders, each once, whatever leads to them."""
    waiting, seen = [path], set()
    while waiting:
        found = waiting.pop()
        try:
            status = found.stat()
            if (status.st_dev, status.st_ino) in seen:
                continue
            seen.add((status.st_dev, status.st_ino))
            if stat.S_ISDIR(status.st_mode):
                waiting += sorted(found.iterdir(), reverse=True)
            elif not stat.S_ISREG(status.st_mode):
                continue
        except OSError:
            continue
        yield found, status
