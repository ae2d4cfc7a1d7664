"""Exceptions whose message is for the user: wrong input, and a run that came to nothing."""

from __future__ import annotations


class BadInputError(ValueError):
    """Input that cannot be used; the message is one sentence: what, where, what is allowed.

    The command line prints the message and exits with status 2. Every folder raises this class (or a
    subclass) for input from outside, and nothing else, so that a traceback always means a defect.
    """


class RunFailedError(RuntimeError):
    """A run that began as it should and cannot go on, or changed nothing; the message is one sentence that says why.

    The command line prints the message and exits with status 1.
    """

    BEGINNING = "the run failed"
    """How every message begins: a run on a server is told of by its message alone."""

    def __init__(self, why: str) -> None:
        super().__init__(f"{self.BEGINNING}: {why}")
