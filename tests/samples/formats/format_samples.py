"""Small data sets in every format that private data may have, written without the code that reads them."""

from __future__ import annotations

import csv
import gzip
import io
import json
import wave
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from idx_samples import idx_bytes
from PIL import Image
from pydantic import TypeAdapter

from conclave.data.formats.config import FormatConfig
from conclave.data.private_data import PrivateData, read_private

FORMAT = TypeAdapter(FormatConfig)
PATIENTS = {
    "age": [50, 61, 42, 33],
    "weight": [70.5, 80.0, 65.25, 90.0],
    "blood": ["A", "0", "A", "B"],
    "patient": ["ann", "bob", "ann", "eve"],
    "ill": ["yes", "no", "no", "yes"],
}
TABLE = {
    "label": "ill",
    "labels": ["no", "yes"],
    "group_by": "patient",
    "categories": {"blood": ["0", "A", "B"]},
    "center": {"age": 50},
    "scale": {"age": 10},
}
ROWS = [[0.0, 70.5, 0, 1, 0], [1.1, 80.0, 1, 0, 0], [-0.8, 65.25, 0, 1, 0], [-1.7, 90.0, 0, 0, 1]]
"""What a model sees of ``PATIENTS``, worked out by hand."""
LABELS = [1, 0, 0, 1]


def parse(document: dict) -> FormatConfig:
    """A configuration as ``node.toml`` would give it."""
    return FORMAT.validate_json(json.dumps(document))


def read(path: Path, unit: str = "record", **document) -> PrivateData:
    return read_private(path, parse(document), unit)


def csv_text(table: dict, *, header: bool = True, delimiter: str = ",") -> str:
    file = io.StringIO()
    writer = csv.writer(file, delimiter=delimiter, lineterminator="\n")
    if header:
        writer.writerow(table)
    writer.writerows(zip(*table.values(), strict=True))
    return file.getvalue()


def write_hugging_face(folder: Path, table: dict, shards: int = 1) -> None:
    """What ``Dataset.save_to_disk`` writes, as its format is; another test compares with the library itself."""
    folder.mkdir(parents=True)
    whole = pa.table(table)
    size, names = -(-len(whole) // shards), []
    for shard in range(shards):
        names.append(f"data-{shard:05d}-of-{shards:05d}.arrow")
        with pa.OSFile(str(folder / names[-1]), "wb") as sink, pa.ipc.new_stream(sink, whole.schema) as stream:
            stream.write_table(whole.slice(shard * size, size))
    (folder / "state.json").write_text(json.dumps({"_data_files": [{"filename": name} for name in names]}))
    (folder / "dataset_info.json").write_text("{}")


def png(array: np.ndarray, kind: str = "PNG") -> bytes:
    file = io.BytesIO()
    Image.fromarray(array).save(file, kind)
    return file.getvalue()


def write_wav(path: Path, samples: np.ndarray, *, width: int = 2, rate: int = 8000) -> None:
    """Write integers, [frames] or [frames, channels], of ``width`` bytes each."""
    channels = 1 if samples.ndim == 1 else samples.shape[1]
    flat = samples.astype("<i4" if width > 1 else "u1").reshape(-1)
    raw = flat.view("u1").reshape(len(flat), flat.itemsize)[:, :width].tobytes()
    path.parent.mkdir(parents=True, exist_ok=True)
    with wave.open(str(path), "wb") as file:
        file.setnchannels(channels)
        file.setsampwidth(width)
        file.setframerate(rate)
        file.writeframes(raw)


def sine(hertz: float, *, amplitude: float = 0.5, rate: int = 8000, seconds: float = 0.5) -> np.ndarray:
    return amplitude * np.sin(2 * np.pi * hertz * np.arange(round(rate * seconds)) / rate)


def _csv(folder: Path) -> tuple[Path, dict]:
    (folder / "a.csv").write_text(csv_text(PATIENTS))
    return folder / "a.csv", {"kind": "csv", **TABLE}


def _csv_gz(folder: Path) -> tuple[Path, dict]:
    (folder / "a.csv.gz").write_bytes(gzip.compress(csv_text(PATIENTS).encode(), mtime=0))
    return folder / "a.csv.gz", {"kind": "csv", **TABLE}


def _parquet(folder: Path) -> tuple[Path, dict]:
    pq.write_table(pa.table(PATIENTS), folder / "a.parquet")
    return folder / "a.parquet", {"kind": "parquet", **TABLE}


def _hugging_face(folder: Path) -> tuple[Path, dict]:
    write_hugging_face(folder / "a", PATIENTS, shards=2)
    return folder / "a", {"kind": "hugging-face", **TABLE}


def _npz(folder: Path) -> tuple[Path, dict]:
    draw = np.random.default_rng(0)
    np.savez(folder / "a.npz", x=draw.random((4, 6, 5)), y=[0, 1, 1, 0], who=["ann", "bob", "ann", "eve"])
    return folder / "a.npz", {"kind": "npz", "image": "x", "label": "y", "classes": 2, "group_by": "who"}


def _idx(folder: Path, pack: Callable[[bytes], bytes] = bytes, suffix: str = "") -> tuple[Path, dict]:
    images = np.random.default_rng(0).integers(0, 256, (4, 6, 5))
    (folder / f"images{suffix}").write_bytes(pack(idx_bytes(images)))
    (folder / f"labels{suffix}").write_bytes(pack(idx_bytes(np.array([0, 1, 1, 0]))))
    names = {"image_file": "images", "label_file": "labels"}
    return folder, {"kind": "idx", "height": 6, "width": 5, "classes": 2, **names}


def _idx_gz(folder: Path) -> tuple[Path, dict]:
    return _idx(folder, gzip.compress, ".gz")


def _image_folder(folder: Path) -> tuple[Path, dict]:
    draw = np.random.default_rng(0)
    for label, who, kind in (
        ("cat", "ann", "png"),
        ("dog", "ann", "bmp"),
        ("dog", "bob", "jpg"),
        ("cat", "eve", "PNG"),
    ):
        file = folder / "a" / label / who / f"1.{kind}"
        file.parent.mkdir(parents=True)
        array = draw.integers(0, 256, (9, 7, 3)).astype(np.uint8)
        file.write_bytes(png(array, "JPEG" if kind == "jpg" else kind.upper()))
    document = {"height": 6, "width": 5, "labels": ["cat", "dog"], "group_by": "folder"}
    return folder / "a", {"kind": "image-folder", **document}


def _wav_folder(folder: Path) -> tuple[Path, dict]:
    for label, who, width in ((0, "ann", 1), (1, "bob", 2), (1, "ann", 3), (0, "eve", 4)):
        wave_ = sine(500 * (1 + label)) * 2 ** (8 * width - 1) + (128 if width == 1 else 0)
        write_wav(folder / "a" / f"{label}_{who}_0.wav", wave_.astype(np.int64), width=width)
    pattern = r"(?P<label>\d)_(?P<group>[a-z]+)_\d+"
    return folder / "a", {"kind": "wav-folder", "rate": 8000, "seconds": 0.5, "classes": 2, "pattern": pattern}


def _text_folder(folder: Path) -> tuple[Path, dict]:
    (folder / "a" / "ann").mkdir(parents=True)
    (folder / "a" / "ann" / "1.txt").write_text("To be, or not to be")
    (folder / "a" / "2.TXT").write_text("that is the question")
    return folder / "a", {"kind": "text-folder", "window": 4}


SAMPLES: dict[str, Callable[[Path], tuple[Path, dict]]] = {
    "csv": _csv,
    "csv, gz": _csv_gz,
    "parquet": _parquet,
    "hugging-face": _hugging_face,
    "npz": _npz,
    "idx": _idx,
    "idx, gz": _idx_gz,
    "image-folder": _image_folder,
    "wav-folder": _wav_folder,
    "text-folder": _text_folder,
}
"""Format → writes a small data set into a folder, returns its path and the configuration that reads it."""
