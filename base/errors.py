"""Every exception of Conclave's own, in one tree.

::

    ConclaveError
    ├── BadInputError                      also a ValueError
    │   └── DamagedKeyError                privacy/ledger/keys.py
    ├── RunFailedError                     also a RuntimeError
    ├── UnavailableError
    ├── LedgerError                        privacy/ledger/errors.py
    │   ├── AlreadyChargedError            privacy/ledger/errors.py
    │   ├── BudgetExhaustedError           privacy/ledger/errors.py
    │   ├── ChargeAbandonedError           privacy/ledger/errors.py
    │   ├── ChargeConflictError            privacy/ledger/errors.py
    │   ├── LedgerMismatchError            privacy/ledger/errors.py
    │   ├── PlanClosedError                privacy/ledger/errors.py
    │   ├── ReplyExpiredError              privacy/ledger/errors.py
    │   └── WitnessUnavailableError        privacy/ledger/errors.py, also a BadInputError
    ├── ProtocolError                      protocol/messages.py
    ├── DroppedError                       server/replies/validation.py
    └── BadValueError                      data/values/rows.py, also a ValueError

The first three are for people: their message is one sentence, and the command line ends with it
(:mod:`conclave.cli.exit_status`). The others pass between parts of Conclave and are caught there. Whoever sees the
traceback of one, or of anything else, has found a defect.
"""

from __future__ import annotations


class ConclaveError(Exception):
    """Whatever Conclave itself raises."""


class BadInputError(ConclaveError, ValueError):
    """Input that cannot be used; the message is one sentence: what, where, what is allowed.

    Every folder raises this class (or a subclass) for input from outside. It is a ValueError because pydantic takes
    nothing else for a refusal.
    """


class RunFailedError(ConclaveError, RuntimeError):
    """A run that cannot begin or go on, or that changed nothing, by what nodes answered; the message says why."""

    BEGINNING = "the run failed"
    """How every message begins: a run on a server is told of by its message alone."""

    def __init__(self, why: str) -> None:
        super().__init__(f"{self.BEGINNING}: {why}")


class UnavailableError(ConclaveError):
    """What was asked is right, but cannot be done now: nobody answers, say; the message is one sentence."""
