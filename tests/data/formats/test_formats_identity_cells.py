"""Cells of typed columns, as records are known by them: values count, and not the types that programs store them in."""

from __future__ import annotations

import datetime
from decimal import Decimal

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from format_samples import read, write_hugging_face

from conclave.base.errors import BadInputError


def known(data) -> list[str]:
    return [bytes(row).hex() for row in data.identity_N]


SAME = {
    "no value among whole numbers": (pa.array([1, 2]), pa.array([1.0, 2.0, None]), pa.array([1, 2], pa.uint8())),
    "doubles": (pa.array([0.5, -0.0]), pa.array([0.5, 0], pa.float16()), pa.array([Decimal("0.5"), Decimal("0.00")])),
    "large numbers": (pa.array([2**53, 2**63 + 1], pa.uint64()), pa.array([Decimal(2**53), Decimal(2**63 + 1)])),
    "true and false": (pa.array([True, False]), pa.array([1, 0]), pa.array([1.0, 0.0])),
    "text": (
        pa.array(["a", "é"]),
        pa.array(["a", "é"], pa.large_string()),
        pa.array(["a", "é"]).dictionary_encode(),
        pa.array([b"a", "é".encode()]),
    ),
    "missing": (pa.array([None, 1.0]), pa.array([float("nan"), 1.0]), pa.array([None, 1])),
    "instants": (
        pa.array([datetime.datetime(2020, 1, 1), datetime.datetime(1969, 12, 31)], pa.timestamp("s")),
        pa.array([datetime.datetime(2020, 1, 1), datetime.datetime(1969, 12, 31)], pa.timestamp("ns")),
        pa.array([datetime.date(2020, 1, 1), datetime.date(1969, 12, 31)], pa.date32()),
        pa.array([datetime.date(2020, 1, 1), datetime.date(1969, 12, 31)], pa.date64()),
    ),
    "time zones": (
        pa.array([10**9, 2], pa.int64()).view(pa.timestamp("us", "Europe/Berlin")),
        pa.array([10**9, 2], pa.int64()).view(pa.timestamp("us", "UTC")),
    ),
    "lists": (
        pa.array([[1, 2], [3, None]]),
        pa.array([[1.0, 2.0], [3.0, None]], pa.large_list(pa.float32())),
        pa.array([[1, 2], [3, None]], pa.list_(pa.int8(), 2)),
    ),
    "named extensions": (
        pa.array([b"0" * 16, b"1" * 16], pa.uuid()),
        pa.array([b"0" * 16, b"1" * 16], pa.binary(16)),
    ),
}


def in_arrow(folder, column) -> list[str]:
    """The first two identities of a data set with this column, in Arrow, which has more types than Parquet."""
    write_hugging_face(folder, {"more": column, "a": [1] * len(column), "y": [0] * len(column)})
    return known(read(folder, kind="hugging-face", features=["a"], label="y", classes=2))[:2]


@pytest.mark.parametrize("name", SAME)
def test_a_value_is_the_same_in_whatever_type_a_program_stored_it(name, tmp_path):
    found = [in_arrow(tmp_path / str(number), column) for number, column in enumerate(SAME[name])]
    assert all(identities == found[0] for identities in found)
    assert found[0][0] != found[0][1]


def test_values_that_are_near_each_other_are_not_the_same(tmp_path):
    columns = [
        pa.array([2**53, 2**53 + 1, 2**63 - 1], pa.int64()),
        pa.array([2**64 - 1, 2**64 - 2, 2**63], pa.uint64()),
        pa.array([Decimal("0.1"), Decimal("0.10000000000000000001"), Decimal("0.2")]),
        pa.array([0.1, 0.1 + 2**-56, float("inf")]),
        pa.array(["", None, "None"]),
        pa.array([[], None, [None]], pa.list_(pa.int8())),
        pa.array([[["a"], ["b"]], [["a", "b"]], [["a"], [], ["b"]]]),
        pa.array([{"u": 1, "v": None}, {"u": None, "v": 1}, None]),
        pa.array([1, 2, 3], pa.duration("ns")),
        pa.array([1, 2, 3], pa.time64("us")),
        pa.array([[("a", 1)], [("b", 1)], None], pa.map_(pa.string(), pa.int8())),
    ]
    for number, column in enumerate(columns):
        write_hugging_face(tmp_path / str(number), {"more": column, "a": [1, 1, 1], "y": [0, 0, 0]})
        data = read(tmp_path / str(number), kind="hugging-face", features=["a"], label="y", classes=2)
        assert len(set(known(data))) == 3, column.type
    assert data.bad == ()


def test_text_that_is_none_costs_no_other_row_wherever_it_is(tmp_path):
    broken = pa.array([[b"a"], [b"\xff"]], pa.list_(pa.binary())).view(pa.list_(pa.string()))
    pq.write_table(pa.table({"more": broken, "a": [1, 2], "y": [0, 1]}), tmp_path / "a.parquet")
    data = read(tmp_path / "a.parquet", kind="parquet", features=["a"], label="y", classes=2)
    assert len(set(known(data))) == 2


def test_a_column_without_identity_is_one_sentence(tmp_path):
    more = pa.array([(1, 2, 3), (4, 5, 6)], pa.month_day_nano_interval())
    write_hugging_face(tmp_path / "a", {"more": more, "a": [1, 2], "y": [0, 1]})
    with pytest.raises(BadInputError, match="column 'more' is of type month_day_nano_interval, must be of text, bytes"):
        read(tmp_path / "a", kind="hugging-face", features=["a"], label="y", classes=2)
