"""The owner's ledger: charge before release, release once, and anyone can check it."""

from conclave.privacy.ledger.entry import ChargeRequest, Entry
from conclave.privacy.ledger.errors import (
    AlreadyChargedError,
    BudgetExhaustedError,
    ChargeAbandonedError,
    ChargeConflictError,
    LedgerError,
    LedgerMismatchError,
    PlanClosedError,
    ReplyExpiredError,
    WitnessUnavailableError,
)
from conclave.privacy.ledger.genesis import Genesis
from conclave.privacy.ledger.heads import KeyRotation, SignedHead
from conclave.privacy.ledger.ledger import Ledger, Reservation, StoredReply, state_of

__all__ = [
    "AlreadyChargedError", "BudgetExhaustedError", "ChargeAbandonedError", "ChargeConflictError", "ChargeRequest",
    "Entry", "Genesis", "KeyRotation", "Ledger", "LedgerError", "LedgerMismatchError", "PlanClosedError",
    "ReplyExpiredError", "Reservation", "SignedHead", "StoredReply", "WitnessUnavailableError", "state_of",
]  # fmt: skip
