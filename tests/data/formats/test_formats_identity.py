"""What a record is known by: what is stored of it and nothing else, however it is read, in every format."""

from __future__ import annotations

import hashlib

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from format_samples import PATIENTS, SAMPLES, TABLE, csv_text, read, write_hugging_face
from identity_samples import CSV, MADE, PICTURES, PINNED, TEXTS, X, hashes, joined
from idx_samples import idx_bytes

from conclave.data.formats import arrow_rows, idx_files, image_folder, npz_file, text_folder, wav_folder
from conclave.data.values import features
from conclave.data.values.identity import SCHEME


def known(data) -> list[str]:
    assert data.identity_N.dtype == np.uint8
    assert data.identity_N.shape == (len(next(iter(data.records.values()))), 32)
    return [bytes(row).hex() for row in data.identity_N]


@pytest.mark.parametrize("name", MADE)
def test_identities_are_hashes_of_what_is_stored_and_stay_what_they_are(name, tmp_path):
    path, document = MADE[name](tmp_path)
    found = known(read(path, **document))
    assert found == hashes(name)
    assert list(dict.fromkeys(found)) == PINNED[name], "every node's records would change sides: see SCHEME"
    assert SCHEME == "1"


OTHERWISE = {
    "csv": {
        "features": ["who"],
        "categories": {"who": ['ann, "a"', "é"]},
        "label": "age",
        "labels": ["50", "61"],
        "group_by": None,
    },
    "parquet": {"features": ["part"], "scale": 9.0, "label": "whole", "labels": {"7": 0, "9007199254740993": 1}},
    "npz": {
        "center": [1.0, 2.0],
        "scale": 0.5,
        "label": "who",
        "labels": ["ann", "bob"],
        "classes": None,
        "group_by": None,
    },
    "idx": {"classes": None, "labels": {"1": 0, "0": 1}},
    "image-folder": {"height": 3, "width": 9, "channels": 3, "max_pixels": 4, "group_by": None},
    "wav-folder": {"seconds": 0.05, "mels": 8, "fft": 128, "group_by": None},
    "text-folder": {"window": 16, "group_by": None},
}
OTHERWISE |= {"csv, gz": OTHERWISE["csv"], "hugging-face": OTHERWISE["parquet"]}


@pytest.mark.parametrize("name", MADE)
def test_another_format_table_changes_records_but_not_what_they_are_known_by(name, tmp_path):
    path, document = MADE[name](tmp_path)
    before = read(path, **document)
    changed = {key: value for key, value in (document | OTHERWISE[name]).items() if value is not None}
    after = read(path, **changed)
    assert set(known(after)) <= set(known(before))
    assert len(set(known(after))) > 1
    shapes = [{key: tensor.tolist() for key, tensor in data.records.items()} for data in (before, after)]
    assert shapes[0] != shapes[1]


def other_picture(content, config):
    return np.full((config.channels, config.height, config.width), 0.25, dtype=np.float32)


DECODERS = {
    "csv": (features, "number_of", lambda *_: 5.0),
    "csv, gz": (features, "number_of", lambda *_: 5.0),
    "parquet": (features, "number_of", lambda *_: 5.0),
    "hugging-face": (features, "number_of", lambda *_: 5.0),
    "npz": (npz_file, "class_of", lambda *_: 1),
    "idx": (idx_files, "class_of", lambda *_: 1),
    "image-folder": (image_folder, "picture_from", other_picture),
    "wav-folder": (wav_folder, "_sound", lambda _, config: np.full(config.samples, 0.5, dtype=np.float32)),
    "text-folder": (text_folder, "windows", lambda content, window: np.zeros((2, window), dtype=np.uint8)),
}


@pytest.mark.parametrize("name", MADE)
def test_another_decoder_changes_records_but_not_what_they_are_known_by(name, tmp_path, monkeypatch):
    path, document = MADE[name](tmp_path)
    before = read(path, **document)
    monkeypatch.setattr(*DECODERS[name])
    after = read(path, **document)
    assert known(after) == known(before)
    assert any(tensor.tolist() != before.records[key].tolist() for key, tensor in after.records.items())


def test_another_decoder_of_pictures_in_a_column_changes_no_identity(tmp_path, monkeypatch):
    pq.write_table(pa.table({"scan": list(PICTURES), "y": [0, 1]}), tmp_path / "a.parquet")
    document = {"kind": "parquet", "image": {"column": "scan", "height": 1, "width": 4}, "label": "y", "classes": 2}
    before = read(tmp_path / "a.parquet", **document)
    monkeypatch.setattr(arrow_rows, "picture_from", other_picture)
    after = read(tmp_path / "a.parquet", **document)
    assert known(after) == known(before)
    assert after.records["image"].tolist() != before.records["image"].tolist()


@pytest.mark.parametrize("kind", ["csv", "parquet", "hugging-face"])
def test_every_cell_of_every_column_makes_another_record_and_of_its_own_row_only(kind, tmp_path):
    def found(table):
        path = tmp_path / f"a.{kind}"
        if kind == "csv":
            path.write_text(csv_text(table))
        elif kind == "parquet":
            pq.write_table(pa.table(table), path)
        else:
            path = tmp_path / str(len(list(tmp_path.iterdir())))
            write_hugging_face(path, table)
        return known(read(path, kind=kind, features=["age"], label="ill", labels=["no", "yes"]))

    before = found(PATIENTS)
    assert len(set(before)) == 4
    other = {"age": 7, "weight": 70.25, "blood": "0A", "patient": "ann ", "ill": {"yes": "no", "no": "yes"}}
    for column, values in PATIENTS.items():
        for row, value in enumerate(values):
            new = other[column][value] if column == "ill" else other[column]
            after = found(PATIENTS | {column: [*values[:row], new, *values[row + 1 :]]})
            assert [i for i in range(4) if after[i] != before[i]] == [row]


def test_what_stands_in_one_cell_is_not_taken_for_the_next(tmp_path):
    path = tmp_path / "a.csv"
    path.write_text('a,b,y\n"1,2",3,0\n1,"2,3",0\n12,3,0\n1,23,0\n1,2,30\n')
    document = {"features": ["a"], "categories": {"a": ["1,2", "1", "12"]}, "label": "y", "labels": {"0": 0, "30": 1}}
    assert len(set(known(read(path, kind="csv", **document)))) == 5


def alter(name, path, place) -> int:
    """Change the byte or number in this place of what is stored; return whose record it was."""
    if name == "npz":
        changed = X.copy()
        changed.flat[place] += 1
        np.savez(path, x=changed, y=[0, 1], who=["ann", "bob"])
        return place // 2
    if name == "idx":
        pixels = np.arange(12)
        pixels[3 * place] += 100
        (path / "images").write_bytes(idx_bytes(pixels.reshape(2, 2, 3)))
        return place // 2
    file = sorted(file for file in path.rglob("*") if file.is_file())[place // 2]
    content = bytearray(file.read_bytes())
    content[-1 - place] ^= 1
    file.write_bytes(content)
    return place // 2


@pytest.mark.parametrize("name", ["npz", "idx", "image-folder", "wav-folder", "text-folder"])
@pytest.mark.parametrize("place", range(4))
def test_every_byte_of_what_is_stored_makes_another_record_and_of_its_own_only(name, place, tmp_path):
    path, document = MADE[name](tmp_path)
    before = known(read(path, **document))
    whose = alter(name, path, place)
    after = known(read(path, **document))
    each = len(before) // 2
    changed = [old != new for old, new in zip(before, after, strict=True)]
    assert changed == [whose == 0] * each + [whose == 1] * each
    assert len(set(after)) == 2


@pytest.mark.parametrize("name", ["image-folder", "wav-folder", "text-folder"])
def test_a_file_that_is_renamed_or_moved_to_another_label_is_the_same_record(name, tmp_path):
    """A label that is put right must not make a record of another side of it."""
    path, document = MADE[name](tmp_path)
    before = known(read(path, **document))
    for number, file in enumerate(sorted(file for file in path.rglob("*") if file.is_file())):
        (path / "1" / "x").mkdir(parents=True, exist_ok=True)
        file.rename(path / "1" / "x" / f"{9 - number}{file.suffix}")
    assert sorted(known(read(path, **document))) == sorted(before)


@pytest.mark.parametrize("name", ["npz", "idx"])
def test_labels_that_are_stored_apart_make_no_other_record(name, tmp_path):
    path, document = MADE[name](tmp_path)
    before = read(path, **document)
    if name == "npz":
        np.savez(path, x=X, y=[1, 1], who=["eve", "zoe"], x2=X)
    else:
        (path / "labels").write_bytes(idx_bytes(np.array([0, 0])))
    after = read(path, **document)
    assert known(after) == known(before)
    assert after.records["label"].tolist() != before.records["label"].tolist()


def test_bad_rows_and_windows_leave_identities_beside_their_records(tmp_path):
    path = tmp_path / "a.csv"
    path.write_text("t,who\nabcdefgh,1\nab,2\nijkl,3\n1,2,3\n")
    data = read(path, kind="csv", text={"column": "t", "window": 4}, group_by="who")
    assert len(data.bad) == 2
    first, last = (hashlib.sha256(row).hexdigest() for row in (joined(b"abcdefgh", b"1"), joined(b"ijkl", b"3")))
    assert known(data) == [first, first, last]


def test_equal_records_have_one_identity_and_order_does_not_matter(tmp_path):
    lines = CSV.splitlines()
    path = tmp_path / "a.csv"
    document = MADE["csv"](tmp_path)[1]
    path.write_bytes(b"\r\n".join([lines[0], lines[2], lines[1], lines[2]]))
    first, last = hashes("csv")
    assert known(read(path, **document)) == [last, first, last]
    (tmp_path / "b").mkdir()
    for name, content in (("2.txt", TEXTS[0]), ("1.txt", TEXTS[0])):
        (tmp_path / "b" / name).write_bytes(content)
    assert len(set(known(read(tmp_path / "b", kind="text-folder", window=8)))) == 1


@pytest.mark.parametrize("name", SAMPLES)
def test_what_identities_depend_on_beside_is_public(name, tmp_path):
    """It is of names, types and sizes alone: other records of the same columns leave it as it is."""
    path, document = SAMPLES[name](tmp_path)
    for unit in ("record", "group"):
        if unit == "group" and name.startswith("idx"):
            continue
        data = read(path, unit, **document)
        assert data.stored_as[:3] == (SCHEME, document["kind"], unit)
        assert not {"ann", "bob", "eve", "yes"} & set(data.stored_as)
        assert "identity" not in repr(data)


@pytest.mark.parametrize(
    ("first", "second", "same"),
    [
        ({"scale": 2.0}, {"scale": 3.0, "center": 1.0, "features": ["weight"]}, True),
        ({"group_by": "patient"}, {}, True),
        ({"columns": ["a", "b", "c", "d", "ill"]}, {"columns": ["e", "f", "g", "h", "ill"]}, True),
        ({"unit": "group", "group_by": "patient"}, {"unit": "group", "group_by": "patient", "scale": 4.0}, True),
        ({"unit": "group", "group_by": "patient"}, {"unit": "group", "group_by": "blood"}, False),
        ({}, {"delimiter": ";"}, False),
        ({}, {"unit": "group", "group_by": "patient"}, False),
    ],
)
def test_what_makes_other_units_of_the_same_file_is_told(first, second, same, tmp_path):
    (tmp_path / "a.csv").write_text(csv_text(PATIENTS))
    (tmp_path / "b.csv").write_text(csv_text(PATIENTS, delimiter=";"))

    def stored_as(unit="record", **change):
        document = {"kind": "csv", "features": ["age"], "label": "ill", "labels": ["no", "yes"]} | change
        if "columns" in change:
            document["features"] = [change["columns"][0]]
        return read(tmp_path / ("b.csv" if "delimiter" in change else "a.csv"), unit, **document).stored_as

    assert (stored_as(**first) == stored_as(**second)) == same


@pytest.mark.parametrize("kind", ["csv", "parquet", "hugging-face", "npz"])
def test_another_column_or_array_is_told(kind, tmp_path):
    found = []
    for number, more in enumerate(({}, {"more": [1.0, 2.0, 3.0, 4.0]})):
        path = tmp_path / f"{number}"
        document = {"kind": kind, **TABLE}
        if kind == "csv":
            path.write_text(csv_text(PATIENTS | more))
            document["features"] = ["age", "blood"]
        elif kind == "parquet":
            pq.write_table(pa.table(PATIENTS | more), path)
        elif kind == "hugging-face":
            write_hugging_face(path, PATIENTS | more)
        else:
            path = path.with_suffix(".npz")
            np.savez(path, x=np.zeros((4, 2 + len(more))), y=[0, 1, 1, 0])
            document = {"kind": "npz", "table": "x", "label": "y", "classes": 2}
        if kind in ("parquet", "hugging-face"):
            document["features"] = ["age", "blood"]
        found.append(read(path, **document).stored_as)
    assert found[0] != found[1]
