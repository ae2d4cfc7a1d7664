"""Small fixed files in every format, byte by byte where a library could write others, and what records are known by.

``HASHED`` is what docs/data.md says, without the code that reads; ``PINNED`` are the hashes themselves. A change of
either moves the records of every node between training and held-out.
"""

from __future__ import annotations

import gzip
import hashlib
import struct
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from format_samples import write_hugging_face
from idx_samples import idx_bytes

DAY = 86_400 * 10**9
TABLE = {
    "whole": pa.array([7, None, 2**53 + 1]),
    "part": pa.array([0.5, float("nan"), -0.0], pa.float32()),
    "name": ["ä", None, ""],
    "seen": pa.array([-1, None, 20_000], pa.date32()),
    "tags": [["a", None], None, []],
    "scan": [{"bytes": b"\xff\x00", "path": None}, None, {"bytes": b"", "path": "p"}],
    "y": [False, True, True],
}
CSV = b'age,who,ill\n 50,"ann, ""a""",yes\n61.0,\xc3\xa9,no\n'


def joined(*cells: bytes) -> bytes:
    """The number of cells, the length of each, the cells."""
    return struct.pack(f"<{1 + len(cells)}Q", len(cells), *map(len, cells)) + b"".join(cells)


def number(value: float) -> bytes:
    return b"n" + struct.pack("<d", value)


ROWS = [
    joined(
        *(number(7), number(0.5), "tä".encode(), b"i-%d" % DAY),
        *(b"l" + joined(b"ta", b""), b"s" + joined(b"t\xff\x00", b""), number(0)),
    ),
    joined(b"", b"", b"", b"", b"", b"", number(1)),
    joined(
        *(b"N9007199254740993", number(0), b"t", b"i%d" % (20_000 * DAY)),
        *(b"l" + joined(), b"s" + joined(b"t", b"tp"), number(1)),
    ),
]


def bmp(pixels: bytes) -> bytes:
    """A picture of 4 × 1 grey pixels."""
    palette = b"".join(bytes([n, n, n, 0]) for n in range(256))
    header = struct.pack("<IiiHHIIiiII", 40, 4, 1, 1, 8, 0, 4, 0, 0, 256, 0)
    offset = 14 + len(header) + len(palette)
    return b"BM" + struct.pack("<IHHI", offset + 4, 0, 0, offset) + header + palette + pixels


def wav(samples: bytes) -> bytes:
    """Sound of 8 bits, 8,000 samples a second."""
    form = struct.pack("<HHIIHH", 1, 1, 8000, 8000, 1, 8)
    body = b"WAVEfmt " + struct.pack("<I", len(form)) + form + b"data" + struct.pack("<I", len(samples)) + samples
    return b"RIFF" + struct.pack("<I", len(body)) + body


def _put(folder: Path, files: dict[str, bytes]) -> Path:
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    return folder


def _csv(folder: Path) -> tuple[Path, dict]:
    document = {"kind": "csv", "features": ["age"], "label": "ill", "labels": ["no", "yes"], "group_by": "who"}
    return _put(folder, {"a.csv": CSV}) / "a.csv", document


def _csv_gz(folder: Path) -> tuple[Path, dict]:
    return _put(folder, {"a.csv.gz": gzip.compress(CSV)}) / "a.csv.gz", _csv(folder)[1]


COLUMNS = {"features": ["whole", "part"], "missing": 0, "label": "y", "labels": ["false", "true"]}


def _parquet(folder: Path) -> tuple[Path, dict]:
    pq.write_table(pa.table(TABLE), folder / "a.parquet")
    return folder / "a.parquet", {"kind": "parquet", **COLUMNS}


def _hugging_face(folder: Path) -> tuple[Path, dict]:
    write_hugging_face(folder / "a", TABLE, shards=2)
    return folder / "a", {"kind": "hugging-face", **COLUMNS}


X = np.array([[1.5, -0.0], [3.0, 4.0]], dtype="<f4")


def _npz(folder: Path) -> tuple[Path, dict]:
    np.savez(folder / "a.npz", x=np.asfortranarray(X), y=[0, 1], who=["ann", "bob"])
    return folder / "a.npz", {"kind": "npz", "table": "x", "label": "y", "classes": 2, "group_by": "who"}


def _idx(folder: Path) -> tuple[Path, dict]:
    files = {"images": idx_bytes(np.arange(12).reshape(2, 2, 3)), "labels": idx_bytes(np.array([1, 0]))}
    names = {"image_file": "images", "label_file": "labels"}
    return _put(folder, files), {"kind": "idx", "height": 2, "width": 3, "classes": 2, **names}


PICTURES = bmp(b"\x00\x40\x80\xff"), bmp(b"\xff\x80\x40\x00")
SOUNDS = wav(bytes(range(256)) * 2), wav(bytes(512))
TEXTS = b"To be, or not to be", b"that is the question"


def _image_folder(folder: Path) -> tuple[Path, dict]:
    document = {"kind": "image-folder", "height": 1, "width": 4, "classes": 2, "group_by": "file"}
    return _put(folder, {"0/a.bmp": PICTURES[0], "1/a.bmp": PICTURES[1]}), document


def _wav_folder(folder: Path) -> tuple[Path, dict]:
    document = {"kind": "wav-folder", "rate": 8000, "seconds": 0.064, "classes": 2, "group_by": "file"}
    return _put(folder, {"0/a.wav": SOUNDS[0], "1/a.wav": SOUNDS[1]}), document


def _text_folder(folder: Path) -> tuple[Path, dict]:
    return _put(folder, {"1.txt": TEXTS[0], "b/2.txt": TEXTS[1]}), {"kind": "text-folder", "window": 8}


MADE: dict[str, Callable[[Path], tuple[Path, dict]]] = {
    "csv": _csv,
    "csv, gz": _csv_gz,
    "parquet": _parquet,
    "hugging-face": _hugging_face,
    "npz": _npz,
    "idx": _idx,
    "image-folder": _image_folder,
    "wav-folder": _wav_folder,
    "text-folder": _text_folder,
}
"""Format → writes the files into a folder, returns the path and the configuration that reads it."""

CELLS = [joined(b" 50", b'ann, "a"', b"yes"), joined(b"61.0", b"\xc3\xa9", b"no")]
HASHED = {
    "csv": CELLS,
    "csv, gz": CELLS,
    "parquet": ROWS,
    "hugging-face": ROWS,
    "npz": [struct.pack("<ff", 1.5, -0.0), struct.pack("<ff", 3.0, 4.0)],
    "idx": [bytes(range(6)), bytes(range(6, 12))],
    "image-folder": list(PICTURES),
    "wav-folder": list(SOUNDS),
    "text-folder": [TEXTS[0], TEXTS[0], TEXTS[1], TEXTS[1]],  # two windows each
}

PINNED = {
    "csv": [
        "157a9e5dc60d18bfac5244c98a8edf76a17b207174dba71956cb6154a0be6768",
        "fa15a327945416cead07eca7948437850980d20e43edf4d9753e7f06815fc5ae",
    ],
    "csv, gz": [
        "157a9e5dc60d18bfac5244c98a8edf76a17b207174dba71956cb6154a0be6768",
        "fa15a327945416cead07eca7948437850980d20e43edf4d9753e7f06815fc5ae",
    ],
    "parquet": [
        "f64b215aeceacb245aca3e10594aed1dcbfef447c3b6b3eca14371b4fe9a0f2f",
        "9ea4719c42585bd25b261bc39fd946832458b2de00ed7111ad0b89e8852758dd",
        "11898b16492d870807744f5c19b7a8fe4a9d166b977570e97f96dc0caa72f16e",
    ],
    "hugging-face": [
        "f64b215aeceacb245aca3e10594aed1dcbfef447c3b6b3eca14371b4fe9a0f2f",
        "9ea4719c42585bd25b261bc39fd946832458b2de00ed7111ad0b89e8852758dd",
        "11898b16492d870807744f5c19b7a8fe4a9d166b977570e97f96dc0caa72f16e",
    ],
    "npz": [
        "937d530fa41fcbc6164988a1952b69213dc6b6f9cdb8a939027135cf9979a710",
        "986c627ee6ef1bcc3d746256a7045624ceeb44c4ed557ca055b2d43933de3489",
    ],
    "idx": [
        "17e88db187afd62c16e5debf3e6527cd006bc012bc90b51a810cd80c2d511f43",
        "e83733f934d0ff090db2edddb0e0d115ddab96772ca977586736e4c4080cd869",
    ],
    "image-folder": [
        "f5db483778cc95aa2887abdbae8dc700c6f37a755d6dd2231a9c9db976753088",
        "c9a6e69613ce5f42cbc16abf3270fdba3c036782474371b54486c92f1409270b",
    ],
    "wav-folder": [
        "cccda1922d23ed337ad03599a9dd792bcf5e1867a33d1d5742afc921e5367dae",
        "c5b464fbcafce22149dcd1883759a8af54aff22db58041dfb4b4a7bb0a3ea304",
    ],
    "text-folder": [
        "80ed7fc26bc0bbb12ef93ae6dbc4bdaae8262e83e65163626e57c24b8fc316a8",
        "9eacacab52caaae2adfeff3e0681f9309ebc777f5db175243c5acc2f5766ee47",
    ],
}
"""Each once, in order."""


def hashes(name: str) -> list[str]:
    return [hashlib.sha256(content).hexdigest() for content in HASHED[name]]
