"""The one exception that means "the caller's input is wrong"."""

from __future__ import annotations


class BadInputError(ValueError):
    """Input that cannot be used; the message is one sentence: what, where, what is allowed.

    The command line prints the message and exits with status 2. Every folder raises this class (or a
    subclass) for input from outside, and nothing else, so that a traceback always means a defect.
    """
