"""A ledger's history as anyone may read it: out of the file itself, or out of an export.

An export is JSON lines: the genesis, then every entry as it was hashed, then the signed head. Each line is canonical
JSON and ends with a line feed, so every byte is covered by the chain, the signature or the format.
"""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO, Protocol

from pydantic import ValidationError

from conclave.base.canonical import canonical_json
from conclave.base.errors import BadInputError
from conclave.base.reading import other_encoding, without_mark
from conclave.privacy.ledger.database import UNREADABLE, altered, read_genesis, read_head
from conclave.privacy.ledger.genesis import FORMAT_VERSION, Genesis
from conclave.privacy.ledger.heads import SignedHead
from conclave.privacy.ledger.schema import format_version, has_plain_tables

_LONGEST_HEAD_LINE = 1024
_LONGEST_LINE = 1 << 20


class History(Protocol):
    """A genesis, the lines of the entries in order, and the signed head that vouches for them."""

    genesis: Genesis
    head: SignedHead

    def lines(self) -> Iterator[bytes]:
        """Yield the entries' canonical JSON, without line feeds."""
        ...


class LedgerFile:
    """The history in a ledger file, read without changing it. Entries that are appended meanwhile are not seen."""

    def __init__(self, path: Path) -> None:
        """Read genesis and head.

        Raises:
            BadInputError: no such file, not a ledger, or of another format version.
        """
        self.path = path
        if not path.is_file():
            raise BadInputError(f"{path}: no such file, must be a ledger")
        try:
            with _reading(path) as db:
                version = format_version(db)
                if version != FORMAT_VERSION:
                    raise BadInputError(
                        f"{path}: ledger format version {version}, must be {FORMAT_VERSION}; nodes convert older ones"
                    )
                if not has_plain_tables(db):  # what is called entries may be a view, which never ends
                    raise altered(path)
                self.genesis = read_genesis(db)
                self.head = read_head(db, self.genesis)
        except BadInputError:
            raise
        except UNREADABLE as error:
            raise BadInputError(f"{path}: not a ledger") from error

    def lines(self) -> Iterator[bytes]:
        """Yield the entries' canonical JSON, up to the head.

        Raises:
            BadInputError: the file is damaged.
        """
        try:
            with _reading(self.path) as db:
                rows = db.execute("SELECT body FROM entries WHERE seq <= ? ORDER BY seq", (self.head.seq,))
                for (body,) in rows:
                    yield body.encode()
        except UNREADABLE as error:
            raise BadInputError(f"{self.path}: damaged, must be a ledger") from error


class LedgerExport:
    """The history in an export file."""

    def __init__(self, path: Path) -> None:
        """Read the first and the last line.

        Raises:
            BadInputError: the file cannot be read, was saved by a program that changed its bytes, was cut off, or one
                of the two lines is not what an export has there.
        """
        self.path = path
        try:
            with path.open("rb") as stream:
                first = stream.readline(_LONGEST_LINE)
                self._start = stream.tell()
                self._end, last = _last_line(stream)
        except OSError as error:
            raise BadInputError(f"{path}: cannot be read ({error.strerror}), must be a ledger's export") from error
        _refuse_other_bytes(path, first, last)
        if self._end < self._start:
            raise BadInputError(f"{path}: not a whole export, must begin with a genesis and end with a signed head")
        self.genesis = _read_genesis_line(path, first)
        self.head = _read_head_line(path, last)

    def lines(self) -> Iterator[bytes]:
        """Yield the entries' lines.

        Raises:
            BadInputError: the file cannot be read, or a line is empty or has another line end than an export's.
        """
        try:
            with self.path.open("rb") as stream:
                stream.seek(self._start)
                left = self._end - self._start
                number = 1
                while left > 0:
                    line = stream.readline(min(left, _LONGEST_LINE))
                    left -= len(line)
                    number += 1
                    if not line:
                        return  # the file was cut while it was read
                    if b"\r" in line:
                        raise _other_line_ends(self.path, f"line {number}")
                    if line == b"\n":
                        raise BadInputError(
                            f"{self.path}: line {number} is empty, must be an entry, as conclave node export wrote it"
                        )
                    yield line[:-1] if line.endswith(b"\n") else line
        except OSError as error:
            raise BadInputError(f"{self.path}: cannot be read ({error.strerror}), must be a ledger's export") from error


def open_history(path: Path) -> History:
    """Open a ledger file or an export, whichever it is.

    Raises:
        BadInputError: it is neither.
    """
    if path.exists() and not path.is_file():  # a pipe would be waited for
        raise BadInputError(f"{path}: is no file, must be a ledger or its export")
    try:
        with path.open("rb") as stream:
            is_database = stream.read(16) == b"SQLite format 3\0"
    except OSError as error:
        raise BadInputError(f"{path}: cannot be read ({error.strerror}), must be a ledger or its export") from error
    return LedgerFile(path) if is_database else LedgerExport(path)


def write_export(history: History, out: BinaryIO) -> int:
    """Write a history as JSON lines; return the number of entries."""
    out.write(history.genesis.line + b"\n")
    count = 0
    for line in history.lines():
        out.write(line + b"\n")
        count += 1
    out.write(history.head.line + b"\n")
    return count


@contextmanager
def _reading(path: Path) -> Iterator[sqlite3.Connection]:
    """Open a ledger file for reading only."""
    uri = path.resolve().as_uri()
    try:
        db = sqlite3.connect(f"{uri}?mode=ro", uri=True)
        try:
            db.execute("SELECT 1 FROM sqlite_master").fetchone()
        except BaseException:
            db.close()
            raise
    except sqlite3.OperationalError:
        # SQLite keeps its index of the write-ahead log beside the file, which a read-only folder does not allow.
        if path.with_name(f"{path.name}-wal").exists():
            raise
        db = sqlite3.connect(f"{uri}?immutable=1", uri=True)
    try:
        yield db
    finally:
        db.close()


def _last_line(stream: BinaryIO) -> tuple[int, bytes]:
    """Return where the last line begins, and the line with its line feed."""
    end = stream.seek(0, 2)
    start = max(0, end - _LONGEST_HEAD_LINE)
    stream.seek(start)
    tail = stream.read()
    begin = tail.rfind(b"\n", 0, len(tail) - 1) + 1
    return start + begin, tail[begin:]


def _refuse_other_bytes(path: Path, first: bytes, last: bytes) -> None:
    """Name what editors, mail and copying do to text: the signature covers the bytes.

    Args:
        first, last: the first and the last line, with their line ends.
    """
    again = "must be the very bytes that conclave node export wrote: copy the file as binary"
    if without_mark(first) != first:
        raise BadInputError(f"{path}: begins with a byte order mark, {again}")
    if (encoding := other_encoding(first)) is not None:
        raise BadInputError(f"{path}: is text in {encoding}, {again}")
    if not first:
        raise BadInputError(f"{path}: is empty, {again}")
    if not first.strip():
        raise BadInputError(f"{path}: begins with an empty line, {again}")
    if not first.startswith(b"{"):
        return  # no genesis, as is said of it next: compressed, quoted, or another file
    if b"\r" in first:
        raise _other_line_ends(path, "line 1")
    if b"\r" in last:
        raise _other_line_ends(path, "the last line")
    if not last.strip():
        raise BadInputError(f"{path}: has an empty line at its end, {again}")
    if not last.strip(b" \t\0\x1a"):
        raise BadInputError(f"{path}: has bytes after its last line that are no text, {again}")
    if not last.endswith(b"\n"):
        whole = last.endswith(b"}")
        what = "the line feed after its last line is missing" if whole else "it was cut off within its last line"
        raise BadInputError(f"{path}: {what}, {again}")


def _other_line_ends(path: Path, where: str) -> BadInputError:
    return BadInputError(
        f"{path}: {where} has other line ends (CR or CR LF, as Windows has), must end in a line feed alone, as "
        "conclave node export wrote it: copy the file as binary"
    )


def _read_genesis_line(path: Path, line: bytes) -> Genesis:
    try:
        genesis = Genesis.parse(line)
    except BadInputError as error:
        raise BadInputError(f"{path}: {error}") from error
    if genesis.line + b"\n" != line:
        raise BadInputError(f"{path}: its genesis is not spelled canonically, so it was altered")
    return genesis


def _read_head_line(path: Path, line: bytes) -> SignedHead:
    try:
        head = SignedHead.model_validate_json(line)
    except ValidationError as error:
        raise BadInputError(
            f"{path}: its last line is no signed head, must end with one: the file was cut off or altered"
        ) from error
    if canonical_json(json.loads(line)) + b"\n" != line:
        raise BadInputError(f"{path}: its signed head is not spelled canonically, so it was altered")
    return head
