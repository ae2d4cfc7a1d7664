"""What a folder of ``datasets`` says about its rows and columns is honoured, or refused."""

from __future__ import annotations

import json

import pyarrow as pa
import pytest
from format_samples import read

from conclave.base.errors import BadInputError


def stream(path, table):
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)
    return {"filename": path.name}


def marked(folder, **state):
    """Six rows in two files and a state as ``datasets`` 1.x wrote it."""
    folder.mkdir()
    x = pa.table({"x": [0.0, 1.0, 2.0, 3.0, 4.0, 5.0], "z": range(6), "y": [0, 1] * 3})
    files = [stream(folder / "0.arrow", x.slice(0, 4)), stream(folder / "1.arrow", x.slice(4))]
    for key in ("_indices_data_files", "_indices_files"):
        if state.get(key):
            state[key] = [
                stream(folder / f"i{n}.arrow", pa.table({"indices": pa.array(part, pa.uint64())}))
                for n, part in enumerate(state[key])
            ]
    if "parts" in state:
        files = [file | part for file, part in zip(files, state.pop("parts"), strict=True)]
    blank = {"_fingerprint": "0", "_format_columns": None, "_format_kwargs": {}, "_format_type": None}
    blank |= {"_output_all_columns": False, "_split": "train", "_inplace_history": [{"transforms": []}] * 2}
    (folder / "state.json").write_text(json.dumps(blank | {"_data_files": files} | state))
    return folder


@pytest.mark.parametrize(
    ("state", "rows"),
    [
        ({"_indices_data_files": None}, [0, 1, 2, 3, 4, 5]),
        ({"_indices_data_files": []}, [0, 1, 2, 3, 4, 5]),
        ({"_indices_data_files": [[5, 0]]}, [5, 0]),
        ({"_indices_files": [[1], [4, 4, 0]]}, [1, 4, 4, 0]),
        ({"_indices_data_files": [[1]]}, [1]),
        ({"parts": [{"skip": 1, "take": 2}, {"skip": 1}]}, [1, 2, 5]),
        ({"parts": [{"skip": 0, "take": 1}, {"take": 0}]}, [0]),
        ({"parts": [{"skip": 3}, {}], "_indices_data_files": [[2, 0]]}, [5, 3]),
    ],
)
def test_rows_that_a_hugging_face_folder_leaves_out_are_not_read(state, rows, tmp_path):
    data = read(marked(tmp_path / "a", **state), kind="hugging-face", features=["x"], label="y", classes=2)
    assert data.records["table"].flatten().tolist() == rows
    assert data.records["label"].tolist() == [row % 2 for row in rows]
    every = read(marked(tmp_path / "b"), kind="hugging-face", features=["x"], label="y", classes=2)
    assert data.identity_N.tolist() == every.identity_N[rows].tolist()


def test_columns_that_a_hugging_face_folder_hides_are_no_features_unless_named(tmp_path):
    shown = {"_format_columns": ["x", "y"]}
    for number, (state, expected) in enumerate(((shown, 1), (shown | {"_output_all_columns": True}, 2), ({}, 2))):
        folder = marked(tmp_path / str(number), **state)
        assert read(folder, kind="hugging-face", label="y", classes=2).schema.features == expected
        assert read(folder, kind="hugging-face", label="y", classes=2, features=["z"]).schema.features == 1


@pytest.mark.parametrize(
    ("state", "expected"),
    [
        ({"_indices_data_files": [[6]]}, "names a row that there is not"),
        ({"parts": [{"skip": -1, "take": 2}, {}]}, "skip and take of 0.arrow must be numbers of rows"),
        ({"parts": [{"skip": 0, "take": "2"}, {}]}, "skip and take of 0.arrow must be numbers of rows"),
        ({"parts": [{"skip": 1 << 70}, {}]}, "skip and take of 0.arrow must be numbers of rows"),
        ({"parts": [{"filter": "x > 1"}, {}]}, "filter of 0.arrow is not known"),
        ({"_inplace_history": [{"transforms": [["remove_columns"]]}]}, "_inplace_history says of the data set"),
        ({"_deleted": [1]}, "_deleted says of the data set what this program does not know"),
        ({"_format_columns": "x"}, "_format_columns must be a list"),
    ],
)
def test_what_a_hugging_face_folder_says_and_is_not_understood_is_refused(state, expected, tmp_path):
    with pytest.raises(BadInputError, match=expected):
        read(marked(tmp_path / "a", **state), kind="hugging-face", label="y", classes=2)


def test_what_a_hugging_face_folder_says_twice_is_refused(tmp_path):
    """One of the two would be ignored."""
    folder = marked(tmp_path / "a")
    state = folder / "state.json"
    state.write_text(state.read_text().rstrip().removesuffix("}") + ', "_split": null, "_split": null}')
    with pytest.raises(BadInputError, match="cannot be read, must be what save_to_disk"):
        read(folder, kind="hugging-face", label="y", classes=2)
