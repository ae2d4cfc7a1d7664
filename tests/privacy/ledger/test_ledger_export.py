"""An export of 100 entries: whatever is done to the file is found.

Found means that it is refused on reading, or that the audit finds something. Every attempt is seeded and none is found
by chance: an attempt that leaves the bytes as they were is not made.
"""

from __future__ import annotations

import io
import json
import random
from collections.abc import Iterable, Iterator
from pathlib import Path

import pytest
import rfc8785
from ledger_samples import genesis, new_ledger
from ledger_tampering import long_life

from conclave.base.errors import BadInputError
from conclave.privacy.ledger.reading.history import LedgerExport, LedgerFile, open_history, write_export
from conclave.privacy.ledger.reading.verification import audit_history


@pytest.fixture(scope="module")
def life(tmp_path_factory):
    return long_life(tmp_path_factory.mktemp("life"))


@pytest.fixture(scope="module")
def whole(life):
    return life.export.read_bytes()


def test_another_implementation_of_rfc_8785_finds_the_same_bytes(whole):
    lines = whole.splitlines()
    assert len(lines) > 100
    for line in lines:
        assert rfc8785.dumps(json.loads(line)) == line
        inside = [text for text in json.loads(line).values() if isinstance(text, str) and text.startswith(("{", "["))]
        assert [rfc8785.dumps(json.loads(text)).decode() for text in inside] == inside


def found(path: Path, **options) -> bool:
    try:
        return bool(audit_history(open_history(path), **options).findings)
    except BadInputError:
        return True


def found_of(attempts: Iterable[bytes], whole: bytes, folder: Path) -> tuple[int, int]:
    """Return how many files were tried and how many were found."""
    path = folder / "altered.jsonl"
    tried = detected = 0
    for content in attempts:
        if content == whole:
            continue
        path.write_bytes(content)
        tried += 1
        detected += found(path)
    return tried, detected


def found_flips(flips: Iterable[tuple[int, int]], whole: bytes, folder: Path) -> tuple[int, int]:
    """Like :func:`found_of`, for single bytes, changed in place: position and new value."""
    path = folder / "flipped.jsonl"
    path.write_bytes(whole)
    tried = detected = 0
    with path.open("r+b", buffering=0) as stream:
        for position, value in flips:
            stream.seek(position)
            stream.write(bytes([value]))
            tried += 1
            detected += found(path)
            stream.seek(position)
            stream.write(whole[position : position + 1])
    assert path.read_bytes() == whole
    return tried, detected


def flips_at(positions: Iterable[int], whole: bytes, seed: int = 1) -> Iterator[tuple[int, int]]:
    """At each position another byte, drawn at random, and for a letter its other case."""
    rng = random.Random(seed)
    for position in positions:
        old = whole[position]
        yield position, (old + rng.randrange(1, 256)) % 256
        if chr(old).isascii() and chr(old).isalpha():
            yield position, old ^ 0x20


def line_positions(whole: bytes, *numbers: int) -> list[int]:
    """The positions of whole lines, line feeds included."""
    lines = whole.splitlines(keepends=True)
    starts = [sum(map(len, lines[:index])) for index in range(len(lines))]
    return [starts[n] + offset for n in numbers for offset in range(len(lines[n]))]


def test_an_export_is_the_databases_history(life, whole):
    database, export = LedgerFile(life.path), LedgerExport(life.export)
    assert (database.genesis, database.head) == (export.genesis, export.head)
    assert list(database.lines()) == list(export.lines())
    assert audit_history(database) == audit_history(export)
    again = io.BytesIO()
    assert write_export(export, again) == 100
    assert again.getvalue() == whole
    assert not found(life.export)


def test_a_ledger_without_entries_has_an_export(tmp_path):
    new_ledger(tmp_path).close()
    path = tmp_path / "empty.jsonl"
    with path.open("wb") as out:
        assert write_export(open_history(tmp_path / "ledger.db"), out) == 0
    assert audit_history(open_history(path)).findings == []
    assert audit_history(open_history(path)).dataset_id == genesis().dataset_id


def test_a_changed_byte_of_any_kind_of_line_is_found(whole, tmp_path):
    """Every ninth position of genesis, head and of one line of each state, then 300 positions anywhere.

    The soak takes them all.
    """
    # admitted, reserved, committed, rotated, abandoned, closed, restored
    kinds = line_positions(whole, 0, 1, 2, 3, 42, 65, 66, 68, 101)[::9]
    anywhere = random.Random(2).sample(range(len(whole)), 300)
    tried, detected = found_flips(flips_at([*kinds, *anywhere], whole), whole, tmp_path)
    assert tried > 1_000
    assert detected == tried


@pytest.mark.slow
def test_every_changed_byte_is_found(whole, tmp_path):
    tried, detected = found_flips(flips_at(range(len(whole)), whole), whole, tmp_path)
    assert detected == tried
    assert tried > 1.3 * len(whole) > 100_000


def test_every_deleted_line_is_found(whole, tmp_path):
    lines = whole.splitlines(keepends=True)
    attempts = [b"".join(lines[:index] + lines[index + 1 :]) for index in range(len(lines))]
    assert found_of(attempts, whole, tmp_path) == (102, 102)


def test_runs_of_deleted_lines_are_found(whole, tmp_path):
    lines = whole.splitlines(keepends=True)
    rng = random.Random(3)
    runs = [sorted(rng.sample(range(len(lines) + 1), 2)) for _ in range(300)]
    attempts = [b"".join(lines[:start] + lines[end:]) for start, end in runs]
    assert found_of(attempts, whole, tmp_path) == (300, 300)


def test_every_swap_of_neighbours_and_many_others_are_found(whole, tmp_path):
    lines = whole.splitlines(keepends=True)
    rng = random.Random(4)
    pairs = [(index, index + 1) for index in range(len(lines) - 1)]
    pairs += [tuple(rng.sample(range(len(lines)), 2)) for _ in range(500)]

    def swapped(a: int, b: int) -> bytes:
        other = [*lines]
        other[a], other[b] = other[b], other[a]
        return b"".join(other)

    assert found_of((swapped(*pair) for pair in pairs), whole, tmp_path) == (601, 601)


def test_every_repeated_line_is_found(whole, tmp_path):
    lines = whole.splitlines(keepends=True)
    rng = random.Random(5)
    attempts = [b"".join(lines[: i + 1] + lines[i:]) for i in range(len(lines))]
    for i in range(len(lines)):  # and elsewhere
        at = rng.randrange(len(lines) + 1)
        attempts.append(b"".join([*lines[:at], lines[i], *lines[at:]]))
    assert found_of(attempts, whole, tmp_path) == (204, 204)


def test_every_truncation_is_found(whole, tmp_path):
    """At every line with and without its line feed, at every byte of the ends, at 1000 bytes anywhere."""
    lines = whole.splitlines(keepends=True)
    ends = [sum(map(len, lines[:index])) for index in range(len(lines))]
    at = {*ends, *(max(0, end - 1) for end in ends)}
    at |= {*range(len(whole) - 1500, len(whole)), *range(1000), *random.Random(6).sample(range(len(whole)), 1000)}
    tried, detected = found_of((whole[:end] for end in sorted(at)), whole, tmp_path)
    assert tried == len(at) > 3000
    assert detected == tried


def test_a_truncation_that_keeps_the_head_is_found(whole, tmp_path):
    lines = whole.splitlines(keepends=True)
    attempts = [b"".join([*lines[:end], lines[-1]]) for end in range(1, len(lines) - 1)]
    assert found_of(attempts, whole, tmp_path) == (100, 100)


def test_bytes_that_do_not_belong_are_found(whole, tmp_path):
    lines = whole.splitlines(keepends=True)
    rng = random.Random(9)
    attempts = [
        b"", b"\n", whole + b"\n", whole + b" ", whole + b" \n", whole + b"\0", whole + whole,
        b"\n" + whole, b" " + whole, b"\xef\xbb\xbf" + whole, whole.replace(b"\n", b"\r\n"),
        whole.replace(b"\n", b"\r"), whole.rstrip(b"\n"),
        whole.replace(b"\n", b" \n"), whole.replace(b'":"', b'": "'), whole.replace(b"\n", b"\n\n"),
        whole.decode().encode("utf-16"), whole.replace(b"delta", b"d\\u0065lta"), whole[::-1],
    ]  # fmt: skip
    for index in range(len(lines)):  # a line end of another kind, or an empty line, at each line
        attempts.append(b"".join([*lines[:index], lines[index][:-1] + b"\r\n", *lines[index + 1 :]]))
        attempts.append(b"".join([*lines[:index], b"\n", *lines[index:]]))
    for _ in range(300):  # a byte more anywhere
        at = rng.randrange(len(whole) + 1)
        attempts.append(whole[:at] + bytes([rng.randrange(256)]) + whole[at:])
    tried, detected = found_of(attempts, whole, tmp_path)
    assert tried == 19 + 204 + 300
    assert detected == tried


COPIED = {
    "a byte order mark": lambda whole: b"\xef\xbb\xbf" + whole,
    "text in UTF-16": lambda whole: whole.decode().encode("utf-16"),
    "line 1 has other line ends": lambda whole: whole.replace(b"\n", b"\r\n"),
    "line 1 has other line ends (CR": lambda whole: whole.replace(b"\n", b"\r"),
    "the last line has other line ends": lambda whole: whole[:-1] + b"\r\n",
    "line 3 has other line ends": lambda whole: whole.replace(b"\n", b"\r\n", 3).replace(b"\r\n", b"\n", 2),
    "the line feed after its last line is missing": lambda whole: whole[:-1],
    "an empty line at its end": lambda whole: whole + b"\n",
    "begins with an empty line": lambda whole: b"\n" + whole,
    "line 2 is empty": lambda whole: whole.replace(b"\n", b"\n\n", 1),
    "has bytes after its last line": lambda whole: whole + bytes(512),
    "is empty, must be": lambda whole: b"",
    "the genesis cannot be read": lambda whole: b"\x1f\x8b\r" + whole[:-1] + b"\r\n",
    "it was cut off within its last line": lambda whole: whole[: len(whole) * 2 // 3],
    "its last line is no signed head": lambda whole: whole[: whole.rindex(b"\n", 0, -1) + 1],
}


@pytest.mark.parametrize("said", COPIED)
def test_what_copying_does_to_an_export_is_said_to_be_that(whole, tmp_path, said):
    """Nobody is called a forger because a mail program turned line feeds into those of another system."""
    path = tmp_path / "export.jsonl"
    path.write_bytes(COPIED[said](whole))
    with pytest.raises(BadInputError) as caught:
        audit_history(open_history(path))
    assert said in str(caught.value)
    assert len(str(caught.value).splitlines()) == 1


def test_an_older_export_is_found_by_what_others_kept_and_by_nothing_else(life, whole, tmp_path):
    """The export as it was at 60 entries is true in itself; only a receipt or the witness can tell that it is old."""
    lines = whole.splitlines(keepends=True)
    older = tmp_path / "older.jsonl"
    for length in (0, 20, 41, 60, 99):
        older.write_bytes(b"".join([*lines[: length + 1], life.heads[length].line + b"\n"]))
        assert not found(older)
        assert found(older, witness=life.witness.read())
        for seq, receipt in life.heads.items():
            assert found(older, receipts=[receipt]) == (seq > length)
    assert not found(life.export, witness=life.witness.read(), receipts=life.heads.values())


def test_a_spliced_export_is_found(life, whole, tmp_path):
    """Lines of another true ledger, with its genesis or its head, fit nowhere."""
    (tmp_path / "other").mkdir()
    other = long_life(tmp_path / "other", dataset="other").export.read_bytes().splitlines(keepends=True)
    lines = whole.splitlines(keepends=True)
    attempts = [b"".join([*lines[:cut], *other[cut:]]) for cut in range(1, 102)]
    attempts += [b"".join([*lines[:i], other[i], *lines[i + 1 :]]) for i in range(102)]
    assert found_of(attempts, whole, tmp_path) == (203, 203)


@pytest.mark.parametrize("what", ["missing", "folder", "empty", "text", "one line", "long line"])
def test_what_is_no_export_is_refused(what, life, whole, tmp_path):
    path = tmp_path / "export"
    content = {
        "empty": b"",
        "text": b"hello\nworld\n",
        "one line": whole.splitlines(keepends=True)[0],
        "long line": b"x" * (3 << 20) + b"\n",
    }
    if what == "folder":
        path.mkdir()
    elif what in content:
        path.write_bytes(content[what])
    with pytest.raises(BadInputError):
        audit_history(open_history(path))
    with pytest.raises(BadInputError):
        audit_history(LedgerExport(path))
