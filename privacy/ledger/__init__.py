"""The owner's ledger: charge before release, release once, and anyone can check it."""

from conclave.privacy.ledger.entry import ChargeRequest, Entry, Genesis
from conclave.privacy.ledger.heads import KeyRotation, SignedHead
from conclave.privacy.ledger.ledger import (
    AlreadyChargedError,
    BudgetExhaustedError,
    ChargeAbandonedError,
    ChargeConflictError,
    Ledger,
    PlanClosedError,
    ReplyExpiredError,
    Reservation,
    StoredReply,
    state_of,
)
from conclave.privacy.ledger.store import LedgerMismatchError
from conclave.privacy.ledger.witness import WitnessUnavailableError

__all__ = [
    "AlreadyChargedError", "BudgetExhaustedError", "ChargeAbandonedError", "ChargeConflictError", "ChargeRequest",
    "Entry", "Genesis", "KeyRotation", "Ledger", "LedgerMismatchError", "PlanClosedError", "ReplyExpiredError",
    "Reservation", "SignedHead", "StoredReply", "WitnessUnavailableError", "state_of",
]  # fmt: skip
