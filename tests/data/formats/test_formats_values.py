"""What single values mean."""

from __future__ import annotations

import hashlib
import math
from decimal import Decimal

import numpy as np
import pytest

from conclave.data.values.kinds import class_of, group_number, group_of, number_of
from conclave.data.values.names import name_of
from conclave.data.values.rows import BadValueError

SPELLED = frozenset({"", "?"})


@pytest.mark.parametrize(
    ("value", "name"),
    [
        ("x", "x"), (" x y\t", "x y"), (b" caf\xc3\xa9 ", "café"), ("007", "007"), ("1.0", "1"),
        (7, "7"), (7.0, "7"), (np.float32(7), "7"), (np.int8(-7), "-7"), (Decimal("7.00"), "7"), (-0.0, "0"),
        (0.5, "0.5"), (Decimal("0.5"), "0.5"), (2**70, str(2**70)), (True, "true"), (np.bool_(False), "false"),
    ],
)  # fmt: skip
def test_names(value, name):
    assert name_of(value) == name
    assert group_of(value) == name


@pytest.mark.parametrize(
    ("value", "why"),
    [
        (None, "is missing"), ("", "is missing"), (b" \n", "is missing"), (math.nan, "is missing"),
        (np.float64("nan"), "is missing"), (Decimal("nan"), "is missing"), (math.inf, "finite number"),
        (Decimal("-Infinity"), "finite number"), (b"\xff", "must be text in UTF-8"), ([1], "must be text"),
        ({"a": 1}, "must be text"), (object(), "must be text"),
    ],
)  # fmt: skip
def test_values_without_a_name(value, why):
    with pytest.raises(BadValueError, match=why):
        name_of(value)
    with pytest.raises(BadValueError, match=f"the group .*{why}"):
        group_of(value)
    with pytest.raises(BadValueError, match=f"the label .*{why}"):
        class_of(value, {"a": 0})


def test_classes_by_name_and_by_number():
    known = {"0": 0, "1": 1, "yes": 1}
    for value in ("1", b"1", 1, 1.0, "1.0", " +1. ", "01", np.uint8(1), Decimal("1.0"), "yes"):
        assert class_of(value, known) == 1
    for value in ("-0", 0.0, "0.000"):
        assert class_of(value, known) == 0
    for value in ("2", -1, 0.5, "1.5", "0x1", "yes!", "Yes", "1" * 30, "02"):
        with pytest.raises(BadValueError, match="the label must be one of labels, or a number below classes"):
            class_of(value, known)
    assert class_of("01", {"01": 5, "1": 6}) == 5  # the name itself comes first


def test_true_and_false_are_1_and_0_where_only_those_are_listed_and_the_reverse():
    for true, false in ((True, False), (np.bool_(True), np.bool_(False)), ("True", "FALSE"), (b"true", b"false")):
        assert [class_of(value, {"0": 0, "1": 1}) for value in (true, false)] == [1, 0]
        assert [class_of(value, {"true": 0, "false": 1}) for value in (true, false)] == [0, 1]
        assert class_of(true, {"1": 0, "true": 1}) == 1
    assert [class_of(value, {"true": 0, "false": 1}) for value in (1, 0.0, "1.0")] == [0, 1, 0]


def test_a_number_that_stands_for_a_missing_one_does_so_however_it_is_stored():
    spelled = frozenset({"-999", "9.9", "none"})
    stored = [-999, -999.0, np.float32(-999), np.int16(-999), Decimal("-999.00"), "-999.0", b" -9.99e2 ", "none", ""]
    stored += [9.9, np.float32(9.9), np.float16(9.9), Decimal("9.90"), "9.900"]
    assert [number_of(value, spelled) for value in stored] == [None] * len(stored)
    for value in (-999, "-999.0", np.float32(9.9), "none"):
        with pytest.raises(BadValueError, match="the group is missing"):
            group_of(value, spelled)
    assert number_of(np.float32(9.8), spelled) == float(np.float32(9.8))
    assert number_of(True, frozenset({"1"})) == 1.0
    assert group_of("NA") == "NA"


@pytest.mark.parametrize(
    ("marker", "values"),
    [
        (" n/a ", ["n/a", " n/a", b"n/a\t"]),
        ("inf", [math.inf, np.float32("inf"), "inf", "Infinity"]),
        ("-Infinity", [-math.inf, Decimal("-Infinity"), np.float16("-inf")]),
        (
            "-3.4028234663852886e+38",
            [np.float32(-3.4028235e38), -3.4028234663852886e38],
        ),  # what GDAL writes for float32
    ],
)
def test_whatever_stands_for_a_missing_value_does_so_as_text_and_as_a_number(marker, values):
    for value in values:
        assert number_of(value, frozenset({marker})) is None, repr(value)
    assert number_of(2.0, frozenset({marker})) == 2.0
    with pytest.raises(BadValueError):
        number_of(math.inf, frozenset({" n/a "}))


@pytest.mark.parametrize(
    ("value", "number"),
    [
        ("1", 1.0), (b" -2.5e3 ", -2500.0), (3, 3.0), (np.int16(3), 3.0), (True, 1.0), (Decimal("0.25"), 0.25),
        (".7", 0.7), ("", None), (b" ? ", None), (None, None), (math.nan, None), (np.float32("nan"), None),
    ],
)  # fmt: skip
def test_numbers(value, number):
    assert number_of(value, SPELLED) == number


@pytest.mark.parametrize(
    "value", ["x", "1_000", "nan", "inf", "1,5", b"\xff", "NA", math.inf, -math.inf, 10**400, [1], {}, object(), "1 2"]
)
def test_what_is_no_number(value):
    with pytest.raises(BadValueError, match="must be a finite number"):
        number_of(value, SPELLED)


def test_a_group_has_the_first_63_bits_of_its_names_hash():
    for name in ("ann", "ä", "", "a/b.txt"):
        bits = "".join(f"{byte:08b}" for byte in hashlib.sha256(name.encode()).digest())
        assert group_number(name) == int(bits[:63], 2) < 2**63
    assert group_number("odd\udcff.txt") < 2**63  # a file's name may be no UTF-8
