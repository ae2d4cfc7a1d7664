"""Files that are whole: a crash, an error or a full disk leaves the old file, the new one or none, never a torn one."""

from __future__ import annotations

import errno
import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

_NO_LINKS = (errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS)


@contextmanager
def new_file(path: Path, *, mode: int) -> Iterator[BinaryIO]:
    """Write a file that must not exist yet; it is there once the block has ended without an error.

    mode: who may read it, before the umask.

    Raises:
        FileExistsError: there is such a file, and it stays as it is.
    """
    _refuse_existing(path)
    with _whole(path, mode, _name) as stream:
        yield stream


@contextmanager
def replaced_file(path: Path, *, mode: int) -> Iterator[BinaryIO]:
    """Write a file that takes the place of another of its name, if any, once the block has ended without an error."""
    with _whole(path, mode, Path.replace) as stream:
        yield stream


def write_atomically(path: Path, content: bytes, *, mode: int = 0o666) -> None:
    """Write a file so that a reader, or a crash, sees the old or the new content and never a mixture.

    mode: who may read it, before the umask.
    """
    with replaced_file(path, mode=mode) as stream:
        stream.write(content)


def append_durably(path: Path, content: bytes) -> None:
    """Add to a file, which is created if need be, so that the addition survives a power cut once this returns."""
    is_new = not path.exists()
    try:
        with path.open("ab") as stream:
            stream.write(content)
            stream.flush()
            os.fsync(stream.fileno())
    except OSError as error:
        raise naming(error, path) from error
    if is_new:
        sync_folder(path.parent)


@contextmanager
def _whole(path: Path, mode: int, name: Callable[[Path, Path], object]) -> Iterator[BinaryIO]:
    # Threads that write the same file, too, must not name each other's half of it.
    partial = path.with_name(f"{path.name}.partial-{os.getpid()}-{threading.get_native_id()}")
    partial.unlink(missing_ok=True)
    try:
        with os.fdopen(os.open(partial, os.O_CREAT | os.O_EXCL | os.O_WRONLY, mode), "wb") as stream:
            yield stream
            stream.flush()
            os.fsync(stream.fileno())
        name(partial, path)
    except OSError as error:
        if error.filename is not None and str(error.filename) != str(partial):  # of another file that the block uses
            raise
        raise naming(error, path) from error
    finally:
        partial.unlink(missing_ok=True)
    sync_folder(path.parent)  # the name itself must survive a power cut


def naming(error: OSError, path: Path) -> OSError:
    """Return an error of the system as one that names a file: the error of a full disk does not by itself."""
    return OSError(error.errno, error.strerror or str(error), str(path))


def sync_folder(folder: Path) -> None:
    """Let a new name in a folder survive a power cut, where the file system can promise that."""
    opened = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(opened)
    except OSError as error:
        if error.errno != errno.EINVAL:  # some network shares know no such thing
            raise
    finally:
        os.close(opened)


def _name(partial: Path, path: Path) -> None:
    """Give a finished file its name; a link fails where another file has it by now, a rename would replace that."""
    try:
        os.link(partial, path)
    except OSError as error:
        if error.errno not in _NO_LINKS:  # a memory stick, a network share
            raise
        _refuse_existing(path)
        partial.rename(path)


def _refuse_existing(path: Path) -> None:
    if os.path.lexists(path):
        raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(path))
