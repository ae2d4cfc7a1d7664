"""The IDX reader: what it reads, and every way a file can be damaged or made to harm."""

from __future__ import annotations

import gzip
import os
import struct

import numpy as np
import pytest
from idx_samples import idx_bytes

from conclave.base.errors import BadInputError
from conclave.data.formats import idx
from conclave.data.formats.idx import read_idx

VALUES = np.random.default_rng(1).integers(0, 256, (5, 4, 3))
GOOD = idx_bytes(VALUES)


def write(tmp_path, content, *, packed):
    path = tmp_path / ("x.gz" if packed else "x")
    path.write_bytes(gzip.compress(content) if packed else content)
    return path


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("shape", [(1,), (7,), (5, 4, 3), (2, 28, 28)])
def test_it_reads_what_was_written(tmp_path, shape, packed):
    values = np.random.default_rng(2).integers(0, 256, shape)
    read = read_idx(write(tmp_path, idx_bytes(values), packed=packed), shape[1:])
    assert read.dtype == np.uint8
    np.testing.assert_array_equal(read, values)


@pytest.mark.parametrize("name", ["x.GZ", "x"])
def test_a_packed_file_is_known_whatever_its_ending(tmp_path, name):
    (tmp_path / name).write_bytes(gzip.compress(GOOD))
    np.testing.assert_array_equal(read_idx(tmp_path / name, (4, 3)), VALUES)


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("length", range(len(GOOD)))
def test_every_truncation_is_refused(tmp_path, length, packed):
    with pytest.raises(BadInputError, match=r"x.*must be"):
        read_idx(write(tmp_path, GOOD[:length], packed=packed), (4, 3))


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("position", range(16))
def test_every_changed_byte_of_the_header_is_refused(tmp_path, position, packed):
    changed = bytearray(GOOD)
    changed[position] ^= 0x41
    with pytest.raises(BadInputError, match=r"x.*must be"):
        read_idx(write(tmp_path, bytes(changed), packed=packed), (4, 3))


def test_every_truncation_and_changed_byte_of_a_gz_file_is_refused_or_changes_nothing(tmp_path):
    """Some bytes of gz say nothing about the content: time, operating system, flags of compression."""
    path, content = tmp_path / "x.gz", gzip.compress(GOOD, mtime=0)
    for length in range(len(content)):
        path.write_bytes(content[:length])
        with pytest.raises(BadInputError, match="must be"):
            read_idx(path, (4, 3))
    harmless = 0
    for position in range(len(content)):
        changed = bytearray(content)
        changed[position] ^= 0x10
        path.write_bytes(bytes(changed))
        try:
            read = read_idx(path, (4, 3))
        except BadInputError:
            continue
        np.testing.assert_array_equal(read, VALUES)
        harmless += 1
    assert harmless <= 6


@pytest.mark.parametrize("packed", [False, True])
def test_more_than_announced_is_refused(tmp_path, packed):
    with pytest.raises(BadInputError, match="holds more values after its header, must be the 60 it announces"):
        read_idx(write(tmp_path, GOOD + b"\0", packed=packed), (4, 3))


def test_another_shape_is_refused_with_what_is_allowed(tmp_path):
    path = write(tmp_path, GOOD, packed=False)
    with pytest.raises(BadInputError, match=r"holds \[5, 4, 3\] values, must be \[one or more, 28, 28\]"):
        read_idx(path, (28, 28))
    with pytest.raises(BadInputError, match="begins with 00000803, must be IDX, 00000801"):
        read_idx(path, ())
    with pytest.raises(BadInputError, match=r"holds \[0, 4, 3\]"):
        read_idx(write(tmp_path, idx_bytes(np.zeros((0, 4, 3), dtype=int)), packed=False), (4, 3))


def test_a_file_that_claims_too_much_is_refused_before_anything_is_unpacked(tmp_path, monkeypatch):
    header = struct.pack(">IIII", 0x803, 0xFFFFFFFF, 28, 28)
    path = tmp_path / "bomb.gz"
    path.write_bytes(gzip.compress(header + bytes(1 << 24)))
    read = []
    original = gzip.GzipFile.read
    monkeypatch.setattr(gzip.GzipFile, "read", lambda self, n=-1: read.append(n) or original(self, n))
    with pytest.raises(BadInputError, match=f"must be at most {idx.MOST_VALUES}"):
        read_idx(path, (28, 28))
    assert read == [16]


def test_no_more_is_unpacked_than_announced(tmp_path, monkeypatch):
    path = tmp_path / "bomb.gz"
    path.write_bytes(gzip.compress(GOOD + bytes(1 << 24)))
    read = []
    original = gzip.GzipFile.read
    monkeypatch.setattr(gzip.GzipFile, "read", lambda self, n=-1: read.append(n) or original(self, n))
    with pytest.raises(BadInputError, match="holds more values"):
        read_idx(path, (4, 3))
    assert read == [16, 61]


def test_what_is_no_file_is_refused(tmp_path):
    with pytest.raises(BadInputError, match="cannot be read"):
        read_idx(tmp_path / "none", (4, 3))
    with pytest.raises(BadInputError, match="cannot be read"):
        read_idx(tmp_path, (4, 3))
    closed = write(tmp_path, GOOD, packed=False)
    closed.chmod(0)
    if os.access(closed, os.R_OK):
        pytest.skip("this user may read everything")
    with pytest.raises(BadInputError, match="cannot be read"):
        read_idx(closed, (4, 3))
