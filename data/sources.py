"""Data sources: named tensors whose first axis is the record, split into private and public test records."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from conclave.base.errors import BadInputError
from conclave.data.config import DataConfig
from conclave.data.digits import load_digits
from conclave.data.mnist import CLASSES, SIDE, load_mnist, mnist_records_if_absent
from conclave.data.stdlib_text import load_stdlib_text
from conclave.data.values.schema import ImageSchema, Schema, TextSchema
from conclave.model.records import Records

GROUP = "group"
"""Name of the column that says which group (patient, author, package) a record belongs to; no model sees it."""


@dataclass(frozen=True)
class DataSet:
    """Training records (to be dealt to nodes) and public test records."""

    schema: Schema
    train: Records
    test: Records


@dataclass(frozen=True)
class _Source:
    schema: Callable[[DataConfig], Schema]
    load: Callable[[DataConfig], tuple[Records, Records]]
    absent_records: Callable[[], int | None] = lambda: None


_SOURCES = {
    "digits": _Source(lambda config: ImageSchema(image=(1, 8, 8), classes=10), load_digits),
    "mnist": _Source(
        lambda config: ImageSchema(image=(1, SIDE, SIDE), classes=CLASSES), load_mnist, mnist_records_if_absent
    ),
    "stdlib-text": _Source(lambda config: TextSchema(window=config.window), load_stdlib_text),
}


def schema_of(config: DataConfig) -> Schema | None:
    """Return what a source's records look like, without loading it; None if only the nodes know."""
    return None if config.source == "nodes" else _SOURCES[config.source].schema(config)


def public_test(config: DataConfig) -> Records | None:
    """Load a source's public test records; None if it has none.

    Raises:
        BadInputError: the source cannot be split as asked.
    """
    return None if config.source == "nodes" else load(config).test


def load(config: DataConfig) -> DataSet:
    """Load a data set.

    Raises:
        BadInputError: the source cannot be split as asked, or its records lie on real nodes.
    """
    schema = schema_of(config)
    if schema is None:
        raise BadInputError("data.source is nodes: the records lie on real nodes; conclave train runs such a scenario")
    train, test = _SOURCES[config.source].load(config)
    return DataSet(schema, train, test)


def records_if_absent(config: DataConfig) -> int | None:
    """Return how many training records a source is known to have if its files are not here; None if they are.

    For estimates: what a run would cost can be said before the data are there.
    """
    return None if config.source == "nodes" else _SOURCES[config.source].absent_records()


def declared_size(units: int) -> int:
    """Return a simulated node's declared size: its true number of units to two significant digits, at least 1.

    Privacy: a declared size is public by assumption. Real nodes declare what their owner chooses.
    """
    if units < 100:
        return max(1, units)
    scale = int(10 ** (len(str(units)) - 2))
    return round(units / scale) * scale
