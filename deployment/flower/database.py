"""Flower's database at a server: brought to the installed version as a whole, or not at all.

Flower's own SuperLink does that in place when it starts, step by step. If it is stopped in the middle, no SuperLink
can open the file, and the enrolled nodes are in it. This uses Flower's inside; ``server start`` checks its version.
"""

from __future__ import annotations

import sqlite3
from contextlib import closing
from pathlib import Path

from conclave.base.errors import BadInputError
from conclave.base.whole_file import sync_folder

_PARTS = ("", "-wal", "-shm", "-journal")


def bring_up_to_date(path: Path) -> None:
    """Make the database, or a newer version of it, next to the file, and replace the file with it.

    Raises:
        BadInputError: the file is not a database of Flower's, or was left by a start that was stopped in the middle.
    """
    from alembic.script import ScriptDirectory
    from flwr.supercore.state.alembic.utils import build_alembic_config, run_migrations
    from sqlalchemy import URL, create_engine, pool

    new = path.with_name(f"{path.name}.new")
    engine = create_engine(URL.create("sqlite", database=str(new)), poolclass=pool.NullPool)
    try:
        (latest,) = ScriptDirectory.from_config(build_alembic_config(engine)).get_heads()
        if path.exists() and _version(path) == latest:
            return
        _remove(new)
        if path.exists():
            _copy(path, new)
        run_migrations(engine)
    except Exception as error:  # of SQLite, SQLAlchemy or Alembic
        _remove(new)
        raise BadInputError(
            f"{path}: cannot be brought to this version of Flower ({type(error).__name__}); restore a copy of it, or "
            "remove it and enrol every node again"
        ) from error
    finally:
        engine.dispose()
    with closing(sqlite3.connect(new)) as database:  # into one file, which is durable then
        database.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    new.chmod(0o600)
    new.replace(path)
    sync_folder(path.parent)


def _version(path: Path) -> str | None:
    with closing(sqlite3.connect(path)) as database:
        if not database.execute("SELECT 1 FROM sqlite_master WHERE name = 'alembic_version'").fetchone():
            return None
        row = database.execute("SELECT version_num FROM alembic_version").fetchone()
    return None if row is None else str(row[0])


def _copy(path: Path, new: Path) -> None:
    with closing(sqlite3.connect(path)) as source, closing(sqlite3.connect(new)) as target:
        source.execute("PRAGMA wal_checkpoint(TRUNCATE)")  # nothing beside the file belongs to what replaces it
        source.backup(target)


def _remove(path: Path) -> None:
    for part in _PARTS:
        path.with_name(f"{path.name}{part}").unlink(missing_ok=True)
