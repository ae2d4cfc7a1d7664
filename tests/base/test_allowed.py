"""Options: what is allowed passes, anything else is one sentence with name, value and bounds."""

from __future__ import annotations

import math

import numpy as np
import pytest

from conclave.base.allowed import FINITE, check_number, check_whole, check_word
from conclave.base.errors import BadInputError


@pytest.mark.parametrize("value", [0, 0.5, 1, np.float32(0.5), np.int64(1), True])
def test_a_number_in_range(value):
    if isinstance(value, bool):
        with pytest.raises(BadInputError, match=r"^rate is True, must be at least 0 and at most 1$"):
            check_number("rate", value, 0.0, 1.0)
    else:
        check_number("rate", value, 0.0, 1.0)


@pytest.mark.parametrize("value", [-1e-9, 1.1, math.nan, math.inf, "1", None, [0.5]])
def test_a_number_out_of_range_or_none_at_all(value):
    with pytest.raises(BadInputError, match=r"^rate is .*, must be at least 0 and at most 1$"):
        check_number("rate", value, 0.0, 1.0)


def test_a_bound_that_is_itself_not_allowed():
    check_number("clip", 5e-324, 0.0, FINITE, above=True)
    for value in (0.0, math.inf):
        with pytest.raises(BadInputError, match="must be above 0"):
            check_number("clip", value, 0.0, FINITE, above=True)


def test_whole_numbers():
    for value in (1, 10, np.int32(3)):
        check_whole("steps", value, 1, 10)
    check_whole("steps", None, 1, 10, may_be_none=True)
    for value in (0, 11, 1.0, True, None, "3", math.nan):
        with pytest.raises(BadInputError, match=r"^steps is .*, must be at least 1 and at most 10, a whole number$"):
            check_whole("steps", value, 1, 10)


def test_words():
    check_word("mode", "b", ["a", "b"])
    for value in ("c", "", None, 1, ["a"]):
        with pytest.raises(BadInputError, match=r"^mode is .*, must be 'a', 'b' or 'd'$"):
            check_word("mode", value, ["a", "b", "d"])
