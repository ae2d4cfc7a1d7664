"""Files of one data set whose columns have several types: read where the values agree, else one sentence."""

from __future__ import annotations

import json
from decimal import Decimal

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from format_samples import read

from conclave.base.errors import BadInputError


def stream(path, table):
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)
    return {"filename": path.name}


AGREE = {
    "int64 and double": (pa.array([1, 2]), pa.array([1.0, None]), [1, 2, 1, None]),
    "bool and int8": (pa.array([True, False]), pa.array([1, 0], pa.int8()), [1, 0, 1, 0]),
    "double and decimal": (pa.array([0.5, 2.0]), pa.array([Decimal("0.5"), None]), [0.5, 2, 0.5, None]),
    "nothing and double": (pa.nulls(2), pa.array([1.5, 2.0]), [None, None, 1.5, 2]),
    "double and nothing": (pa.array([1.5, 2.0]), pa.nulls(2), [1.5, 2, None, None]),
}


@pytest.mark.parametrize("kind", ["parquet", "hugging-face"])
@pytest.mark.parametrize("name", AGREE)
def test_numbers_of_several_types_are_one_column(kind, name, tmp_path):
    one, two, values = AGREE[name]
    data = read(parts(kind, tmp_path / "a", one, two), kind=kind, label="y", classes=2, missing=-1)
    assert data.records["table"].flatten().tolist() == [-1 if value is None else value for value in values]
    document = {"features": ["x"], "center": 1.0}
    assert len(read(parts(kind, tmp_path / "b", one, two), kind=kind, label="y", classes=2, **document).bad) == sum(
        value is None for value in values
    )


@pytest.mark.parametrize("kind", ["parquet", "hugging-face"])
@pytest.mark.parametrize(
    "two",
    [
        pa.array(["a", "b"], pa.large_string()),
        pa.array(["a", "b"]).dictionary_encode(),
        pa.array([b"a", b"b"]),
        pa.nulls(2, pa.null()),
    ],
)
def test_text_of_several_types_is_one_column(kind, two, tmp_path):
    path = parts(kind, tmp_path / "a", pa.array(["a", "b"]), two)
    data = read(path, kind=kind, label="y", classes=2, categories={"x": ["a", "b", ""]}, features=["x"])
    expected = [[0, 0, 1], [0, 0, 1]] if pa.types.is_null(two.type) else [[1, 0, 0], [0, 1, 0]]
    assert data.records["table"].tolist() == [[1, 0, 0], [0, 1, 0], *expected]


def parts(kind, path, one, two):
    """A data set of two files, whose column x is ``one`` in the first and ``two`` in the second."""
    tables = [pa.table({"x": column, "y": [0, 1]}) for column in (one, two)]
    path.mkdir()
    for number, table in enumerate(tables):
        pq.write_table(table, path / f"{number}.parquet") if kind == "parquet" else stream(
            path / f"{number}.arrow", table
        )
    files = [{"filename": f"{number}.arrow"} for number in range(2)]
    (path / "state.json").write_text(json.dumps({"_data_files": files}))
    return path


@pytest.mark.parametrize("kind", ["parquet", "hugging-face"])
@pytest.mark.parametrize(
    ("two", "types"),
    [
        (pa.array(["007", "8"]), "column 'x' is of type string, and int64 there"),
        (pa.array([[1], [2]]), "column 'x' is of type list<.*>, and int64 there"),
        (pa.array([1, 2], pa.timestamp("s")), r"column 'x' is of type timestamp\[.*\], and int64 there"),
    ],
)
def test_values_of_two_kinds_in_one_column_are_one_sentence_with_both_types(kind, two, types, tmp_path):
    path = parts(kind, tmp_path / "a", pa.array([7, 8]), two)
    name = "1.parquet: has other columns than 0.parquet" if kind == "parquet" else "1.arrow: has other columns"
    with pytest.raises(BadInputError, match=rf"{name}.*{types}.*must hold the same kind of values in every file"):
        read(path, kind=kind, features=["x"], label="y", classes=2)


def test_a_table_with_a_log_of_deleted_rows_is_refused(tmp_path):
    """The folder itself, one above it, and a file of it."""
    (tmp_path / "table").mkdir()
    above, tmp_path = tmp_path, tmp_path / "table"
    pq.write_table(pa.table({"x": [1.0], "y": [0]}), tmp_path / "a.parquet")
    for mark in ("_delta_log/0.json", "metadata/v1.metadata.json", ".hoodie/hoodie.properties"):
        (tmp_path / mark).parent.mkdir()
        (tmp_path / mark).write_text("{}")
        for path in (tmp_path, above, tmp_path / "a.parquet"):
            with pytest.raises(BadInputError, match="whose log says which rows were deleted; must be plain Parquet"):
                read(path, kind="parquet", label="y", classes=2)
        (tmp_path / mark).unlink()
        (tmp_path / mark).parent.rmdir()
    assert len(read(tmp_path, kind="parquet", label="y", classes=2).records["label"]) == 1
