"""One value, one name: whatever type a program stored it in, however it is spelled, in whatever format."""

from __future__ import annotations

import datetime
import unicodedata
import uuid
from decimal import Decimal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from format_samples import csv_text, read, write_hugging_face
from hypothesis import given
from hypothesis import strategies as st

from conclave.data.values.kinds import group_number
from conclave.data.values.names import name_of, number_in

BIG = 2**60
NIGHT = datetime.datetime(2020, 1, 1)
SAME = {
    "12": ["12", "12.0", " 12 ", "+12", "1.2e1", "1.2E+01", "12.", b"12.00", "12\0\0", 12, 12.0, np.uint8(12),
           np.float16(12), np.float32(12), Decimal("12.00"), Decimal("1.2E+1")],
    "-3": ["-3", "-3.0", -3, -3.0, np.int8(-3), Decimal("-3.0")],
    "0": ["0", "-0", "0.0", "-0.0", ".0", "+0", "0.0e+00", 0, -0.0, np.float32(-0.0), Decimal("-0.0")],
    "0.1": ["0.1", ".1", "0.10", "1e-1", "0.10000000000000001", 0.1, np.float32(0.1), np.float16(0.1), Decimal("0.10")],
    "1e-07": ["1e-07", "0.0000001", "1E-7", 1e-7, np.float32(1e-7), Decimal("0.0000001")],
    str(2**53 + 1): [str(2**53 + 1), f"{2**53 + 1}.0", 2**53 + 1, np.uint64(2**53 + 1), Decimal(2**53 + 1)],
    str(BIG): [str(BIG), repr(float(BIG)), f"{float(BIG):.17g}", f"{float(BIG):f}", BIG, float(BIG), np.float32(BIG),
               Decimal(BIG)],
    "100000000000000000000": ["1e20", "1e+20", 10**20, 1e20],
    "007": ["007", b" 007 "],
    "true": [True, np.bool_(True), "true", "True", "TRUE"],
    "false": [False, "false", "False", b"FALSE"],
    "Jos\u00e9": ["Jos\u00e9", "Jose\u0301", " Jos\u00e9", "Jose\u0301".encode()],
    "2020-01-01": ["2020-01-01", "2020-01-01 00:00:00", "2020-01-01T00:00:00.000000", "2020-01-01T00:00Z",
                   "2020-01-01 01:00:00+01:00", NIGHT.date(), NIGHT, NIGHT.replace(tzinfo=datetime.UTC),
                   np.datetime64("2020-01-01"), np.datetime64(NIGHT, "ns"), np.datetime64("2020-01-01", "M")],
    "1": ["1e0", "1E0", "1.0e0", "+1e0"],
    "12345678901234567168": [Decimal("12345678901234567890.5"), "12345678901234567890.50", 12345678901234567890.5],
    "2020-01-01T12:30:00.25": ["2020-01-01 12:30:00.250", "2020-01-01T12:30:00.25Z", "2020-01-01T14:30:00.25+0200",
                               NIGHT.replace(hour=12, minute=30, microsecond=250_000),
                               np.datetime64("2020-01-01T12:30:00.25", "ns")],
    "12345678-90ab-cdef-1234-567890abcdef": [uuid.UUID(int=0x1234567890ABCDEF1234567890ABCDEF),
                                             "12345678-90AB-CDEF-1234-567890ABCDEF"],
}  # fmt: skip
"""Name → how programs store and print one value."""


@pytest.mark.parametrize("name", SAME)
def test_one_value_has_one_name(name):
    for value in SAME[name]:
        assert name_of(value) == name, repr(value)
    assert name_of(name) == name


def test_text_that_only_looks_like_a_number_is_itself():
    texts = ["007", "-007", "00", "01.0", "1_000", "1,5", "0x10", "12e", "1e400", "1e-400", "1.2.3", "+", "-", ".",
             "e5",
             "0e12", "2e05", "inf", "nan", "12 34", "\u0661\u0662", "2020-13-01 00:00", "2020-01-01T25:00:00", "NaN",
             "9" * 400 + ".5", "TrUe", "20-20"]  # fmt: skip
    for text in texts:
        assert name_of(text) == text
    assert len({name_of(text) for text in texts}) == len(texts)


@given(st.floats(allow_nan=False, allow_infinity=False))
def test_a_number_and_what_is_printed_of_it_have_one_name(number):
    decimal = Decimal(repr(number))
    names = {name_of(number), name_of(repr(number)), name_of(f"{number:.17g}"), name_of(f"{number:.16e}")}
    assert len(names) == 1
    assert float(names.pop()) == number
    if abs(number) < 2**53:
        assert name_of(decimal) == name_of(number)
    if abs(number) < 3e38:
        single = np.float32(number)
        assert np.float32(name_of(single)) == single


@given(st.integers(-(10**30), 10**30))
def test_all_digits_of_a_whole_number_count(number):
    assert name_of(number) == name_of(str(number)) == name_of(Decimal(number)) == name_of(f"{number}.0") == str(number)


@given(st.text(max_size=12).filter(str.strip))
def test_a_name_is_its_own_name_in_every_form_of_unicode(text):
    text = text.strip().rstrip("\0").strip()
    if text:
        name = name_of(text)
        assert name_of(name) == name
        assert name_of(unicodedata.normalize("NFD", text)) == name_of(unicodedata.normalize("NFC", text)) == name
        if number_in(name) is None and not name[0].isdigit() and name.lower() not in ("true", "false"):
            assert name == unicodedata.normalize("NFC", text)


def write(kind, folder, column):
    """A data set with these groups, and how it is read."""
    folder.mkdir()
    n = len(column)
    document = {"kind": kind, "label": "y", "classes": 2, "group_by": "g"}
    if kind == "npz":
        np.savez(folder / "a.npz", x=np.zeros((n, 2)), y=np.zeros(n, int), g=column)
        return folder / "a.npz", document | {"table": "x"}
    table = {"x": [0.0] * n, "y": [0] * n, "g": column}
    if kind == "csv":
        (folder / "a.csv").write_text(csv_text(table), encoding="utf-8")
        return folder / "a.csv", document | {"features": ["x"]}
    if kind == "parquet":
        pq.write_table(pa.table(table), folder / "a.parquet")
        return folder / "a.parquet", document | {"features": ["x"]}
    write_hugging_face(folder / "a", table)
    return folder / "a", document | {"features": ["x"]}


COLUMNS = {
    "12 and 13": [
        ("csv", ["12", "13.0"]), ("csv", [" +12", "1.3e1"]), ("parquet", pa.array([12, 13])),
        ("parquet", pa.array([12, 13, None], pa.float64())), ("parquet", pa.array(["12.0", "13"]).dictionary_encode()),
        ("hugging-face", pa.array([12, 13], pa.decimal128(5, 2))),
        ("hugging-face", pa.array(["12", "13"], pa.large_string())),
        ("hugging-face", pa.array([12, 13], pa.float32()).dictionary_encode()), ("npz", np.array([12, 13], np.uint8)),
        ("npz", np.array([12, 13, np.nan], np.float16)), ("npz", np.array(["12", "13.0"])),
        ("npz", np.array([b"12", b"13"])),
    ],
    "0.1 and 0.25": [
        ("csv", ["0.1", "0.250"]), ("parquet", pa.array([0.1, 0.25])),
        ("parquet", pa.array([0.1, 0.25, None], pa.float32())),
        ("hugging-face", pa.array([0.1, 0.25], pa.float16())), ("npz", np.array([0.1, 0.25], np.float32)),
        ("hugging-face", pa.array([Decimal("0.10"), Decimal("0.25")])),
    ],
    "2020-01-01 and 1969-12-31T06:00:00": [
        ("csv", ["2020-01-01 00:00:00", "1969-12-31 06:00:00"]),
        *(("parquet", pa.array([NIGHT, datetime.datetime(1969, 12, 31, 6), None], pa.timestamp(unit, zone)))
          for unit in ("ms", "us", "ns") for zone in (None, "UTC", "Europe/Berlin")),
        ("npz", np.array(["2020-01-01", "1969-12-31T06", "NaT"], "datetime64[s]")),
    ],
    "2020-01-01 and 0001-01-01": [
        ("csv", ["2020-01-01", "0001-01-01"]), ("parquet", pa.array([NIGHT.date(), datetime.date(1, 1, 1)])),
        ("hugging-face", pa.array([NIGHT.date(), datetime.date(1, 1, 1)], pa.date64())),
    ],
    "Jos\u00e9 and 007": [
        ("csv", ["Jose\u0301", "007"]), ("parquet", pa.array(["Jos\u00e9 ", "007"])),
        ("npz", np.array(["Jose\u0301", " 007"])), ("hugging-face", pa.array(["Jos\u00e9".encode(), b"007"])),
    ],
    f"{BIG + 1} and {BIG}": [
        ("csv", [str(BIG + 1), str(BIG)]), ("parquet", pa.array([BIG + 1, BIG])), ("npz", np.array([BIG + 1, BIG])),
        ("hugging-face", pa.array([BIG + 1, BIG], pa.decimal128(25, 3))),
    ],
}  # fmt: skip
"""The names of two groups → columns of them as formats store them, some with a third row that has none."""


@pytest.mark.parametrize("names", COLUMNS)
def test_a_group_is_the_same_in_whatever_format_its_rows_are(names, tmp_path):
    expected = [group_number(name) for name in names.split(" and ")]
    for number, (kind, column) in enumerate(COLUMNS[names]):
        path, document = write(kind, tmp_path / str(number), column)
        data = read(path, "group", **document)
        assert data.records["group"].tolist() == expected, (kind, column)
        assert [row.why for row in data.bad] == ["the group is missing, must be given"] * (len(column) - 2)


@pytest.mark.parametrize("names", COLUMNS)
def test_labels_and_categories_are_found_in_whatever_format_they_are(names, tmp_path):
    listed = names.split(" and ")
    for number, (kind, column) in enumerate(COLUMNS[names]):
        path, document = write(kind, tmp_path / str(number), column)
        document |= {"label": "g", "labels": [f" {listed[1]}", unicodedata.normalize("NFD", listed[0])]}
        del document["group_by"], document["classes"]
        assert read(path, **document).records["label"].tolist() == [1, 0], (kind, column)
        if kind != "npz":
            document |= {"label": "y", "labels": ["0", "1"], "features": ["g"], "categories": {"g": listed}}
            assert read(path, **document).records["table"].tolist() == [[1, 0], [0, 1]], (kind, column)


def test_rows_without_a_group_are_left_out_however_that_is_spelled(tmp_path):
    (tmp_path / "a.csv").write_text("x,y,g\n1,0,ann\n2,0,NA\n3,1,\n4,1,nan\n5,1,bob\n")
    data = read(tmp_path / "a.csv", "group", kind="csv", label="y", classes=2, group_by="g")
    assert data.records["group"].tolist() == [group_number("ann"), group_number("bob")]
    assert {row.why for row in data.bad} == {"the group is missing, must be given"}
    data = read(tmp_path / "a.csv", "group", kind="csv", label="y", classes=2, group_by="g", missing_values=["bob"])
    assert data.records["group"].tolist() == [group_number(name) for name in ("ann", "NA", "nan")]


def test_its_owner_is_told_of_groups_that_may_have_lost_their_zeros(tmp_path, caplog):
    (tmp_path / "a.csv").write_text("x,y,g\n1,0,007\n2,0,7\n3,1,0\n4,1,08\n5,1,7.0\n")
    data = read(tmp_path / "a.csv", "group", kind="csv", label="y", classes=2, group_by="g")
    assert len(data.records["group"].unique()) == 4
    assert "1 groups have another's name but for zeros before it" in caplog.text
