"""A node's ledger from a message's view: what pays, under the lease, and the codes that the server may see."""

from __future__ import annotations

import platform
import sqlite3
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from types import MappingProxyType

import torch

from conclave.base.canonical import canonical_json, sha256
from conclave.base.errors import BadInputError
from conclave.model.records import Records
from conclave.privacy.ledger import (
    AlreadyChargedError,
    BudgetExhaustedError,
    ChargeAbandonedError,
    ChargeConflictError,
    ChargeRequest,
    Ledger,
    LedgerError,
    LedgerMismatchError,
    PlanClosedError,
    ReplyExpiredError,
    Reservation,
    SignedHead,
    StoredReply,
    WitnessUnavailableError,
)
from conclave.protocol.code_identity import code_hash
from conclave.protocol.messages import Code, ProtocolError

LocalState = tuple[bytes | None, ...]


@dataclass(frozen=True)
class HeldOut:
    """The held-out side of a node: records that never train, and the ledger that pays for measuring on them."""

    records: Records
    ledger: Ledger


@contextmanager
def paid(
    ledger: Ledger,
    charge: ChargeRequest,
    new_secret: Callable[[str], bytes],
    set_aside: Callable[[], None],
    state: Callable[[], LocalState] = tuple,
) -> Iterator[tuple[Reservation | StoredReply, LocalState]]:
    """Reserve a charge of a plan and hold the ledger's lease while its work is done.

    Args:
        new_secret: charge id → 256-bit secret.
        set_aside: sets the budget of the charge's plan aside; called if none is set aside.
        state: reads, under the lease, the state of the node that the output depends on.

    Yields:
        What pays, or the reply that was stored before; and the state.

    Raises:
        ProtocolError: with the code that the server may see.
    """
    charge_id = charge.charge_id(ledger.genesis.ledger_id)
    if not ledger.knows(charge_id) and not ledger.is_open(charge.run_id, charge.plan_hash):
        set_aside()
    with ExitStack() as leased:
        with as_codes():
            leased.enter_context(ledger.lease())
        states = state()
        key = repeat_key(torch.device("cpu"), _joined(states))
        with as_codes():
            reservation = ledger.reserve(charge, new_secret(charge_id), repeat_key=key)
        yield reservation, states


def repeat_key(device: torch.device, start_state: bytes | None) -> str:
    """Return a hash of what an output depends on, besides the request and the secret.

    A charge pays for one output. After a crash the work may run again only where the output would be the same, bit for
    bit: with the same secret, code, numeric environment and start state.

    Args:
        device: where the work runs.
        start_state: what an earlier charge left on the node, if anything.
    """
    environment = [
        code_hash(),
        torch.__version__,
        platform.machine(),
        torch.backends.cpu.get_cpu_capability(),
        torch.get_num_threads(),
        torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "" if start_state is None else sha256(start_state),
    ]
    return sha256(canonical_json(environment))


def check_receipt(ledger: Ledger, receipt: SignedHead | None) -> None:
    """Compare with the server's receipt of a ledger: the server must not have seen more than is here.

    Raises:
        ProtocolError: ``ledger-mismatch``, or ``bad-request`` for a receipt of another ledger.
    """
    if receipt is None or ledger.holds(receipt):
        return
    keys = (ledger.genesis.public_key, *(rotation.new_key for rotation in ledger.rotations))
    if receipt.ledger_id != ledger.genesis.ledger_id or not any(map(receipt.signed_by, keys)):
        raise ProtocolError("bad-request", "the receipt is not of this ledger")
    raise ProtocolError(
        "ledger-mismatch", f"the server has a receipt of entry {receipt.seq}, which this ledger does not hold"
    )


CODE_OF: Mapping[type[LedgerError], Code] = MappingProxyType(
    {
        AlreadyChargedError: "already-charged",
        BudgetExhaustedError: "budget-exhausted",
        ChargeAbandonedError: "charge-abandoned",
        ChargeConflictError: "bad-request",
        LedgerMismatchError: "ledger-mismatch",
        PlanClosedError: "not-allowed",
        ReplyExpiredError: "reply-expired",
        WitnessUnavailableError: "internal-error",  # of its disk, which may be there again
    }
)
"""What the server may see of a ledger's refusal."""


@contextmanager
def as_codes() -> Iterator[None]:
    """Turn the ledger's answers into the codes that the server may see."""
    try:
        yield
    except LedgerError as error:
        raise ProtocolError(CODE_OF[type(error)], str(error)) from error
    except BadInputError as error:
        raise ProtocolError("not-allowed", str(error)) from error
    except sqlite3.OperationalError as error:  # of the disk; the transaction was undone
        raise ProtocolError("internal-error", f"the ledger cannot be written: {error}; look at its disk") from error


def _joined(states: tuple[bytes | None, ...]) -> bytes | None:
    """Return one value that stands for several states; None if there are none."""
    if all(state is None for state in states):
        return None
    return canonical_json(["" if state is None else sha256(state) for state in states])
