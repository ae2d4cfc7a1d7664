"""From the values of a row to the numbers that a model sees."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from conclave.base.errors import BadInputError
from conclave.data.values.config import FeaturesConfig
from conclave.data.values.kinds import means_missing, number_of, place_of
from conclave.data.values.names import is_missing, name_of
from conclave.data.values.rows import BadValueError


class Features:
    """The features of a table: which columns, and the public constants by which they are standardised."""

    def __init__(self, config: FeaturesConfig, columns: Sequence[str], path: Path) -> None:
        """Fix the features.

        Args:
            columns: those that are features, in order.
            path: the file, for errors.

        Raises:
            BadInputError: there is no feature, or a constant or category is for a column that is not a feature.
        """
        self.columns = tuple(columns)
        if not self.columns:
            raise BadInputError(f"{path}: has no column of features, must have at least one beside label and group")
        for key in ("categories", "center", "scale"):
            named = getattr(config, key)
            for column in named if isinstance(named, dict) else ():
                if column not in self.columns:
                    raise BadInputError(f"{path}: {key} names the column {column!r}, must be one of its features")
        self._missing = config.missing
        self._spelled_missing = frozenset(config.missing_values)
        self._categories = {column: _places(listed) for column, listed in config.categories.items()}
        self._center = {c: _constant(config.center, c, 0.0) for c in self.columns}
        self._scale = {c: _constant(config.scale, c, 1.0) for c in self.columns}
        self.count = sum(len(self._categories.get(column, "1")) for column in self.columns)

    def row(self, values: Mapping[str, object]) -> np.ndarray:
        """Return the features of one row, float32 [count].

        Raises:
            BadValueError: a value is missing, is not a number, or is not a known category.
        """
        found: list[float] = []
        for column in self.columns:
            try:
                found += self._features_of(column, values[column])
            except BadValueError as error:
                raise BadValueError(f"column {column!r} {error}") from None
        with np.errstate(over="ignore"):
            row_F = np.asarray(found, dtype=np.float32)
        if not np.isfinite(row_F).all():
            raise BadValueError("a value must be within what float32 holds")
        return row_F

    def _features_of(self, column: str, value: object) -> list[float]:
        known = self._categories.get(column)
        if known is not None:
            place = None if is_missing(value) else place_of(value, known)
            if place is None and means_missing(value, self._spelled_missing):
                place = known.get("")
            if place is None:
                raise BadValueError("must be one of its categories")
            return [float(i == place) for i in range(len(known))]
        number = number_of(value, self._spelled_missing)
        if number is not None:
            return [(number - self._center[column]) / self._scale[column]]
        if self._missing is None:
            raise BadValueError("is missing, must be given where missing is not set")
        return [self._missing]


def _places(listed: Sequence[str]) -> dict[str, int]:
    """Return the place of every category by its name; the empty one stands for no value."""
    return {name_of(value) if value.strip() else "": place for place, value in enumerate(listed)}


def _constant(given: float | Mapping[str, float], column: str, otherwise: float) -> float:
    return given if isinstance(given, float) else given.get(column, otherwise)
