"""What the formats of private data have in common: labels, pictures, and the columns of tables.

Classes, categories, sizes and the constants of normalisation are stated by the owner, never taken from the data: what
one record could otherwise change how others are seen, and whether the model fits.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Annotated, Literal, Self, TypeVar

from pydantic import AfterValidator, BeforeValidator, Field, model_validator

from conclave.base.frozen import Frozen
from conclave.data.values.names import column_name, name_of

Name = Annotated[str, Field(min_length=1, max_length=1000)]
Names = Annotated[tuple[Name, ...], Field(strict=False, min_length=1, max_length=65_536)]
ImageSide = Annotated[int, Field(ge=1, le=4096)]
Window = Annotated[int, Field(ge=2, le=65_536)]
Constant = Annotated[float, Field(ge=-1e9, le=1e9)]
Scale = Annotated[float, Field(gt=0.0, le=1e9)]

MISSING = ("", "?", "NA", "N/A", "NaN", "nan", "null", "NULL", "None")
"""What stands for a missing value, unless the owner says otherwise."""
MissingValues = Annotated[tuple[str, ...], Field(strict=False)]


def first_given(config: Frozen, keys: Iterable[str]) -> str | None:
    """Return the first of these keys that is not at its default."""
    fields = type(config).model_fields
    return next((k for k in keys if getattr(config, k) != fields[k].get_default(call_default_factory=True)), None)


def _distinct(values: tuple[str, ...]) -> tuple[str, ...]:
    if len(set(values)) < len(values):
        raise ValueError("names one value twice, must name each once")
    return values


def _stated(value: object) -> object:
    if isinstance(value, str):
        raise ValueError("must be a number that you state: constants are public, and never worked out from the data")
    return value


def _column(name: str) -> str:
    if not (column := column_name(name)):
        raise ValueError("is blank, must name a column")
    return column


def _known(value: str) -> str:
    return name_of(value) if value.strip() else ""


_Values = TypeVar("_Values", tuple[str, ...], dict[str, int])


def _distinct_values(values: _Values) -> _Values:
    """Refuse lists in which one value appears twice, as 1 and 1.0 or with and without a space, with two meanings."""
    meant: dict[str, int] = {}
    for place, value in enumerate(values):
        means = values[value] if isinstance(values, dict) else place
        if meant.setdefault(_known(value), means) != means:
            raise ValueError("names one value twice, must name each once")
    return values


def _not_blank(values: _Values) -> _Values:
    if not all(value.strip() for value in values):
        raise ValueError("names a blank value, must name values: a row without a label is left out")
    return values


Stated = BeforeValidator(_stated)
Column = Annotated[Name, AfterValidator(_column)]
Columns = Annotated[tuple[Column, ...], Field(strict=False, min_length=1, max_length=65_536), AfterValidator(_distinct)]
Categories = Annotated[
    tuple[str, ...], Field(strict=False, min_length=1, max_length=65_536), AfterValidator(_distinct_values)
]

Labels = (
    Annotated[Names, AfterValidator(_not_blank), AfterValidator(_distinct_values)]
    | Annotated[
        dict[Name, Annotated[int, Field(ge=0, lt=1_000_000)]],
        AfterValidator(_not_blank),
        AfterValidator(_distinct_values),
    ]
)
Classes = Annotated[int, Field(ge=2, le=1_000_000)]


class LabelledConfig(Frozen):
    """What a label may be: either ``labels`` or ``classes`` is given.

    labels: the names of all classes in their order, or a map from each name to its class, where several may share one.
        A value has one name in every format: 1 for 1.0, and no spaces around it; see :mod:`conclave.data.values.names`.
    classes: how many there are, if labels are the numbers 0, 1, … themselves.
    """

    labels: Labels | None = None
    classes: Classes | None = None

    @model_validator(mode="after")
    def _labels_or_classes(self) -> Self:
        if (self.labels is None) == (self.classes is None):
            raise ValueError("exactly one of labels and classes must be given")
        if self.class_count < 2:
            raise ValueError(f"labels name {self.class_count} class, must name at least 2")
        return self

    @property
    def class_count(self) -> int:
        """How many classes there are."""
        if self.classes is not None:
            return self.classes
        if isinstance(self.labels, dict):
            return max(self.labels.values(), default=-1) + 1
        return len(self.labels or ())

    def known(self) -> dict[str, int]:
        """Return the class of every label by its name, which is that of :func:`conclave.data.values.names.name_of`."""
        if isinstance(self.labels, dict):
            return {name_of(label): number for label, number in self.labels.items()}
        names = map(str, range(self.class_count)) if self.labels is None else map(name_of, self.labels)
        return {name: number for number, name in enumerate(names)}


class PictureConfig(Frozen):
    """Pictures are resized to ``height`` × ``width`` and turned to grey (``channels`` 1) or colours (3).

    max_pixels: a larger picture is a bad row, and is not decoded.
    """

    height: ImageSide
    width: ImageSide
    channels: Literal[1, 3] = 1
    max_pixels: int = Field(default=1 << 26, ge=1, le=1 << 26)


class FeaturesConfig(Frozen):
    """Which columns of a row are its features, and how they become numbers.

    features: the columns, in the order of the model's features. Default: all with a name that are neither label nor
        group; of typed files, those of numbers that are neither an index of pandas nor hidden by ``datasets``.
    categories: column → all values it may have, the empty one for none. It becomes one feature for each: 1 for the
        row's own, 0 for the others.
    center, scale: a number enters as ``(value − center)/scale``: one constant for all columns of numbers, or one for
        each column named, the others having 0 and 1.
    missing: what the model sees if a number is missing (0 is the center). If not given, such a row is a bad row.
    missing_values: what stands for a missing value, besides nothing at all: text as it is spelled, and numbers however
        they are spelled or stored. A row whose group is missing is a bad row.
    """

    features: Columns | None = None
    categories: dict[Column, Categories] = Field(default_factory=dict)
    center: Annotated[Constant | dict[Column, Constant], Stated] = 0.0
    scale: Annotated[Scale | dict[Column, Scale], Stated] = 1.0
    missing: Constant | None = None
    missing_values: MissingValues = MISSING

    @model_validator(mode="after")
    def _columns_are_features(self) -> Self:
        for key in ("categories", "center", "scale"):
            named = getattr(self, key)
            if not isinstance(named, dict):
                continue
            for column in named:
                if self.features is not None and column not in self.features:
                    raise ValueError(f"{key} names the column {column!r}, must be one of features")
                if key != "categories" and column in self.categories:
                    raise ValueError(f"{key} names the column {column!r}, must not be one of categories")
        return self


class TextColumnConfig(Frozen):
    """A column of text, cut into disjoint windows of ``window`` bytes; each is a record."""

    column: Column
    window: Window


class PictureColumnConfig(PictureConfig):
    """A column of encoded pictures (PNG, JPEG, BMP): bytes, or a struct with a field ``bytes`` as ``datasets`` has."""

    column: Column
