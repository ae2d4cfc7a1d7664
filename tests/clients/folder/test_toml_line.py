"""Whatever a value is, the line says that value."""

from __future__ import annotations

import tomllib
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from conclave.clients.folder.node_config import (
    BudgetConfig,
    DatasetConfig,
    StorageConfig,
    default_text,
    parse_node_config,
)
from conclave.clients.folder.toml_line import toml_line


@given(st.text(st.characters(exclude_categories=["Cs"])))
def test_a_text_is_read_as_it_was_written(text):
    assert tomllib.loads(toml_line("key", text)) == {"key": text}


@pytest.mark.parametrize("value", [1e-05, 8.0, 0.1, 2**63 - 1, ["a", '"b"'], []])
def test_so_are_numbers_and_lists(value):
    read = tomllib.loads(toml_line("key", value))["key"]
    assert (read, type(read)) == (value, type(value))


def test_a_node_is_told_what_was_decided_for_it():
    name = 'a "ward"\\7\n\N{LANGUAGE TAG}\x7f'
    dataset = DatasetConfig(id=name, data=Path(name), declared_size=3, held_out=0.25)
    budget = BudgetConfig(epsilon=8.0, delta=1e-5)
    storage = StorageConfig(state=Path("s"), witness=Path(name), machine=name)
    read = parse_node_config(tomllib.loads(default_text(dataset, budget, storage)), where="node.toml")
    assert (read.dataset, read.budget, read.storage) == (dataset, budget, storage)
