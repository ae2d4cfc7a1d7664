"""How a ledger refuses."""

from __future__ import annotations

from typing import ClassVar

from conclave.base.errors import BadInputError, ConclaveError


class LedgerError(ConclaveError):
    """A ledger does not do what it was asked. Where nothing else is said, the message is what the class means."""

    meaning: ClassVar[str] = "the ledger refuses"

    def __init__(self, why: str | None = None) -> None:
        super().__init__(self.meaning if why is None else why)


class AlreadyChargedError(LedgerError):
    """The run was charged for this round before, with other content, or its plan has no such charge left.

    Nothing was written. The round is over for this ledger; later ones are not.
    """

    meaning = "the plan has no such charge left, or none in this round"


class BudgetExhaustedError(LedgerError):
    """The charge, or the plan, would exceed the budget; nothing was written."""

    meaning = "the budget does not suffice"


class ChargeAbandonedError(LedgerError):
    """The charge was given up; it stays spent and is not run again."""

    meaning = "the charge was given up"


class ChargeConflictError(LedgerError):
    """The charge was made before with another mechanism or other releases; nothing was written."""

    meaning = "the charge was made before with other content"


class LedgerMismatchError(LedgerError):
    """The ledger contradicts its witness or a receipt: it is an older copy, or was replaced. Nothing was written."""


class PlanClosedError(LedgerError):
    """The budget set aside for this plan was given back; a closed plan is not opened again."""

    meaning = "the plan was closed"


class ReplyExpiredError(LedgerError):
    """The charge was committed but its stored reply has been pruned, or damaged."""

    meaning = "the reply is no longer kept, or is damaged"


class WitnessUnavailableError(LedgerError, BadInputError):
    """The witness's disk is full, or its place cannot be reached. The ledger itself is whole."""
