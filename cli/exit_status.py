"""How a command ends: its exit status, and the sentence where it could not do what was asked."""

from __future__ import annotations

import errno
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from enum import IntEnum
from typing import TypeGuard

import typer

from conclave.base.errors import BadInputError, RunFailedError, UnavailableError


class ExitStatus(IntEnum):
    """What a script may decide by.

    Two ends are not Conclave's to decide: click ends with 1, and without a word, where whoever reads the output has
    closed the pipe (``conclave … | head``), and with 130 after Ctrl-C.
    """

    FINE = 0
    """What was asked is done. A check found nothing that speaks against the claim."""

    VIOLATION = 1
    """A check found a violation, or something that is not in order; what was printed says what."""

    BAD_INPUT = 2
    """What was asked cannot be done as it was asked, nor later: options, files, configuration, permissions.

    Also of ``audit model`` where it found nothing, but could not run every check.
    """

    NOT_NOW = 3
    """What was asked could not be done now: nobody answers, nodes refuse, a run failed or was stopped, a node runs
    already, the disk is full, a connection broke. The same command may be given again later."""


SAID = (BadInputError, RunFailedError, UnavailableError, OSError)
"""What is for people: one sentence. Whatever else is raised is a defect and shows its traceback."""

_OF_THE_INPUT = (FileNotFoundError, FileExistsError, IsADirectoryError, NotADirectoryError, PermissionError)
_CODES_OF_THE_INPUT = (errno.ENAMETOOLONG, errno.ELOOP, errno.EADDRINUSE)


def status_of(error: Exception) -> ExitStatus:
    """Return what one of :data:`SAID` ends a command with.

    Bad input that was met as an error of the system (a file that cannot be written, say) is what the system says it is.
    """
    if isinstance(error, BadInputError):
        cause = error.__cause__
        return ExitStatus.NOT_NOW if _is_the_systems(cause) and not _names_input(cause) else ExitStatus.BAD_INPUT
    if isinstance(error, OSError) and _names_input(error):
        return ExitStatus.BAD_INPUT
    return ExitStatus.NOT_NOW


def sentence_of(error: Exception) -> str:
    """Return what one of :data:`SAID` says; an error of the system names the file, if it knows one."""
    if not isinstance(error, OSError):
        return str(error)
    reason = error.strerror or str(error) or type(error).__name__
    return reason if error.filename is None else f"{error.filename}: {reason}"


@contextmanager
def to_be_started_again() -> Iterator[None]:
    """Let systemd start a process again that an error of the system has ended: its unit does not where input was bad.

    What a node or a server works with was there when it started; whatever happens to it later may pass.
    """
    try:
        yield
    except OSError as error:
        say(sentence_of(error))
        raise typer.Exit(ExitStatus.NOT_NOW) from error


def say(sentence: str) -> None:
    """Write one line, whatever names the sentence repeats: a file's may have ends of lines in it."""
    from conclave.report.printing import on_one_line

    if sys.stderr is not None:  # it may be closed
        sys.stderr.write(f"conclave: {on_one_line(sentence)}\n")


def _is_the_systems(cause: BaseException | None) -> TypeGuard[OSError]:
    """Say whether the system itself refused. Libraries raise kinds of OSError about what a file holds, too."""
    return isinstance(cause, OSError) and type(cause).__module__ == "builtins" and cause.errno is not None


def _names_input(error: OSError) -> bool:
    """Say whether what was named is wrong: no such file, another kind of file, no permission, a name too long."""
    return isinstance(error, _OF_THE_INPUT) or error.errno in _CODES_OF_THE_INPUT
