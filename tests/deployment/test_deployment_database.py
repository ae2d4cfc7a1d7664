"""Flower's database at a server: whole and of the installed version, whenever a start was ended."""

from __future__ import annotations

import sqlite3
from contextlib import closing
from pathlib import Path

import pytest
from alembic import command
from flwr.supercore.state.alembic import utils
from sqlalchemy import create_engine

from conclave.base.errors import BadInputError
from conclave.deployment.flower.database import bring_up_to_date


def tables(path: Path) -> set[str]:
    with closing(sqlite3.connect(path)) as database:
        return {name for (name,) in database.execute("SELECT name FROM sqlite_master WHERE type = 'table'")}


def beside(path: Path) -> list[str]:
    return sorted(found.name for found in path.parent.iterdir())


def older(path: Path) -> None:
    """Make the database of Flower's first version that had versions, with a row of ours."""
    engine = create_engine(f"sqlite:///{path}")
    command.upgrade(utils.build_alembic_config(engine), utils.FLWR_STATE_BASELINE_REVISION)
    engine.dispose()
    with closing(sqlite3.connect(path)) as database:
        database.execute("PRAGMA journal_mode = WAL")
        database.execute("CREATE TABLE kept (value TEXT)")
        database.execute("INSERT INTO kept VALUES ('who is enrolled')")
        database.commit()


def kept(path: Path) -> list[tuple[str]]:
    with closing(sqlite3.connect(path)) as database:
        return database.execute("SELECT value FROM kept").fetchall()


def test_a_new_one_is_what_flower_makes_and_is_left_alone_afterwards(tmp_path):
    path = tmp_path / "flower.db"
    bring_up_to_date(path)
    engine = create_engine(f"sqlite:///{path}")
    expected = set(utils.get_combined_metadata().tables)
    engine.dispose()
    assert expected <= tables(path)
    before = (path.read_bytes(), path.stat().st_ino)
    bring_up_to_date(path)
    assert (path.read_bytes(), path.stat().st_ino) == before
    assert beside(path) == ["flower.db"]
    assert path.stat().st_mode & 0o777 == 0o600


def test_an_older_one_is_brought_up_to_date_with_all_that_is_in_it(tmp_path):
    path = tmp_path / "flower.db"
    older(path)
    bring_up_to_date(path)
    assert kept(path) == [("who is enrolled",)]
    assert set(utils.get_combined_metadata().tables) <= tables(path)
    assert beside(path) == ["flower.db"]


@pytest.mark.parametrize("ended_by", [KeyboardInterrupt, RuntimeError])
def test_one_that_is_ended_in_the_middle_leaves_the_old_one(tmp_path, monkeypatch, ended_by):
    path = tmp_path / "flower.db"
    older(path)
    before = tables(path)

    def half(engine):
        with engine.begin() as connection:
            connection.exec_driver_sql("CREATE TABLE half (x)")
        raise ended_by

    with monkeypatch.context() as patch:
        patch.setattr(utils, "run_migrations", half)
        with pytest.raises((KeyboardInterrupt, BadInputError)):
            bring_up_to_date(path)
    assert tables(path) == before
    assert kept(path) == [("who is enrolled",)]
    bring_up_to_date(path)  # what a killed start left beside it is no obstacle
    assert "half" not in tables(path)
    assert kept(path) == [("who is enrolled",)]


@pytest.mark.parametrize("content", ["torn", "of a later version", "half made"])
def test_one_that_cannot_be_used_is_one_sentence_and_stays(tmp_path, content):
    path = tmp_path / "flower.db"
    if content == "torn":
        path.write_bytes(b"not a database at all")
    else:
        bring_up_to_date(path)
        with closing(sqlite3.connect(path)) as database:
            statement = "UPDATE alembic_version SET version_num = 'ffff'"
            database.execute(statement if content == "of a later version" else "DELETE FROM alembic_version")
            database.commit()
    before = path.read_bytes()
    with pytest.raises(BadInputError, match=r"flower\.db: cannot be brought to this version of Flower"):
        bring_up_to_date(path)
    assert path.read_bytes() == before
    assert beside(path) == ["flower.db"]
