"""How private data are laid out: which columns, arrays or folders hold what. All of it is public by assumption."""

from __future__ import annotations

import re
from typing import Annotated, Literal, Self

from pydantic import BeforeValidator, Field, model_validator

from conclave.base.frozen import Frozen
from conclave.data.values.config import (
    MISSING,
    Classes,
    Column,
    Columns,
    Constant,
    FeaturesConfig,
    ImageSide,
    LabelledConfig,
    Labels,
    MissingValues,
    Name,
    PictureColumnConfig,
    PictureConfig,
    Scale,
    Stated,
    TextColumnConfig,
    Window,
    first_given,
)
from conclave.data.values.log_mel import LogMelConfig

_LABELS = ("label", "labels", "classes")


class ColumnsConfig(FeaturesConfig):
    """What formats with columns share: a row is a row of numbers, unless ``text`` or ``image`` names a column.

    label: the column of the label; text has none.
    group_by: the column that says which group (patient, author) a row belongs to.
    """

    label: Column | None = None
    labels: Labels | None = None
    classes: Classes | None = None
    group_by: Column | None = None
    text: TextColumnConfig | None = None

    @property
    def picture(self) -> PictureColumnConfig | None:
        """The column of pictures, if there is one."""
        return None

    @property
    def labelled(self) -> LabelledConfig:
        """What a label may be."""
        return LabelledConfig(labels=self.labels, classes=self.classes)

    @model_validator(mode="after")
    def _one_kind_of_record(self) -> Self:
        table = first_given(self, (key for key in FeaturesConfig.model_fields if key != "missing_values"))
        if self.text is not None and self.picture is not None:
            raise ValueError("text and image are both given, must be one of them")
        kind = "text" if self.text is not None else "image" if self.picture is not None else None
        if kind is not None and table:
            raise ValueError(f"{table} is given beside {kind}, must not be: it is about tables")
        if self.text is not None:
            if labelled := first_given(self, _LABELS):
                raise ValueError(f"{labelled} is given beside text, must not be: text has no labels")
        elif self.label is None:
            raise ValueError("label is missing, must name the column of the label")
        else:
            LabelledConfig(labels=self.labels, classes=self.classes)
        if self.label is not None and self.label == self.group_by:
            raise ValueError(f"label and group_by are both {self.label!r}, must be two columns")
        for column in (self.label, self.group_by):
            if column is not None and column in (*(self.features or ()), *self.categories):
                raise ValueError(f"the column {column!r} is label or group, must not be a feature")
        return self


class CsvConfig(ColumnsConfig):
    """A CSV file, or a folder of ``.csv`` files, plain or ``.gz``.

    columns: the names of all columns, for files without a header.
    """

    kind: Literal["csv"]
    columns: Columns | None = None
    delimiter: str = Field(default=",", pattern=r"^[\t !#-/:-@\[-`{-~]$")


class _PicturesConfig(ColumnsConfig):
    """Formats with columns of bytes; ``image`` names one that holds pictures."""

    image: PictureColumnConfig | None = None

    @property
    def picture(self) -> PictureColumnConfig | None:
        """The column of pictures, if there is one."""
        return self.image


class ParquetConfig(_PicturesConfig):
    """A Parquet file, or a folder of ``.parquet`` files."""

    kind: Literal["parquet"]


class HuggingFaceConfig(_PicturesConfig):
    """A folder that ``Dataset.save_to_disk`` wrote; ``split`` names one of a ``DatasetDict``."""

    kind: Literal["hugging-face"]
    split: Name | None = None


class NpzConfig(Frozen):
    """A ``.npz`` file of arrays whose first axis is the record. ``image``, ``table`` or ``text`` names the records.

    image: uint8, or floats in [0, 1], with the axes that ``axes`` says.
    table: numbers [records, features]; ``center`` and ``scale``, one for each feature or one for all, ``missing`` and
        ``missing_values`` are as in :class:`FeaturesConfig`.
    text: uint8 [records, window].
    label, group_by: the names of the arrays of labels and groups, numbers, strings or dates.
    """

    kind: Literal["npz"]
    image: Name | None = None
    table: Name | None = None
    text: Name | None = None
    axes: Literal["HW", "CHW", "HWC"] = "HW"
    label: Name | None = None
    labels: Labels | None = None
    classes: Classes | None = None
    group_by: Name | None = None
    center: Annotated[Constant | Annotated[tuple[Constant, ...], Field(strict=False)], Stated] = 0.0
    scale: Annotated[Scale | Annotated[tuple[Scale, ...], Field(strict=False)], Stated] = 1.0
    missing: Constant | None = None
    missing_values: MissingValues = MISSING

    @property
    def labelled(self) -> LabelledConfig:
        """What a label may be."""
        return LabelledConfig(labels=self.labels, classes=self.classes)

    @model_validator(mode="after")
    def _one_kind_of_record(self) -> Self:
        given = [key for key in ("image", "table", "text") if getattr(self, key) is not None]
        if len(given) != 1:
            raise ValueError("exactly one of image, table and text must be given")
        for kind, keys in (("image", ("axes",)), ("table", ("center", "scale", "missing"))):
            if kind not in given and (key := first_given(self, keys)):
                raise ValueError(f"{key} is given, must not be without {kind}")
        if "text" in given:
            if labelled := first_given(self, _LABELS):
                raise ValueError(f"{labelled} is given beside text, must not be: text has no labels")
        elif self.label is None:
            raise ValueError("label is missing, must name the array of labels")
        else:
            LabelledConfig(labels=self.labels, classes=self.classes)
        return self


class IdxConfig(LabelledConfig):
    """A folder with two IDX files, plain or ``.gz``: images of ``height`` × ``width`` bytes, and their labels."""

    kind: Literal["idx"]
    image_file: Name = "train-images-idx3-ubyte"
    label_file: Name = "train-labels-idx1-ubyte"
    height: ImageSide = 28
    width: ImageSide = 28


def _pattern(value: object) -> object:
    if isinstance(value, str):
        try:
            named = set(re.compile(value).groupindex)
        except re.error as error:
            raise ValueError(f"is no regular expression: {error}") from error
        if not named or named - {"label", "group"}:
            raise ValueError("must name a group (?P<label>…) or (?P<group>…), and no other")
    return value


class FolderConfig(Frozen):
    """What formats with one file per record share.

    pattern: a regular expression that fits the whole name of a file without its suffix. ``(?P<label>…)`` in it is the
        label, instead of the sub-folder's name; ``(?P<group>…)`` the group.
    group_by: ``folder``: a group is a folder with all that lies below it: the folder directly within the label's, so
        that a group may have files of several labels; if folders do not give labels, the first folder. ``file``: each
        file is a group.
    """

    pattern: Annotated[str, BeforeValidator(_pattern), Field(max_length=1000)] | None = None
    group_by: Literal["folder", "file"] | None = None

    def names(self, part: str) -> bool:
        """Whether the pattern gives the ``label`` or the ``group``."""
        return self.pattern is not None and part in re.compile(self.pattern).groupindex

    @property
    def grouped(self) -> bool:
        """Whether files belong to groups."""
        return self.group_by is not None or self.names("group")

    @model_validator(mode="after")
    def _one_group(self) -> Self:
        if self.names("group") and first_given(self, ("group_by",)):
            raise ValueError(f"group_by is {self.group_by} and pattern names a group, must be one of them")
        return self


class ImageFolderConfig(FolderConfig, LabelledConfig, PictureConfig):
    """A folder of pictures (png, jpg, jpeg, bmp) in sub-folders that are named like their labels."""

    kind: Literal["image-folder"]


class WavFolderConfig(FolderConfig, LabelledConfig, LogMelConfig):
    """A folder of ``.wav`` files in sub-folders that are named like their labels.

    PCM of 8, 16, 24 or 32 bits, or floats of 32 or 64. Each becomes a picture, [1, mels, frames]; see
    :class:`conclave.data.values.log_mel.LogMelConfig`.

    resample: other rates are resampled linearly, rather than being bad rows.
    """

    kind: Literal["wav-folder"]
    resample: bool = False


class TextFolderConfig(FolderConfig):
    """A folder of ``.txt`` files, cut into disjoint windows of ``window`` bytes, each a record, each file a group."""

    kind: Literal["text-folder"]
    window: Window
    group_by: Literal["folder", "file"] | None = "file"

    @model_validator(mode="after")
    def _no_label(self) -> Self:
        if self.names("label"):
            raise ValueError("pattern names a label, must not: text has no labels")
        return self


FormatConfig = Annotated[
    CsvConfig
    | ParquetConfig
    | HuggingFaceConfig
    | NpzConfig
    | IdxConfig
    | ImageFolderConfig
    | WavFolderConfig
    | TextFolderConfig,
    Field(discriminator="kind"),
]
