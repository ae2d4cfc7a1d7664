"""Messages between server and nodes: typed, versioned, and with no field that is not declared here.

How they travel: :mod:`conclave.protocol.codec`.
"""

from __future__ import annotations

from typing import Annotated, Literal, Self, get_args

from pydantic import Field, model_validator

from conclave.base.canonical import sha256
from conclave.base.errors import ConclaveError
from conclave.base.frozen import Frozen
from conclave.model.config import ModelConfig
from conclave.model.experts.config import HeldExperts
from conclave.privacy.ledger.genesis import ledger_id_of
from conclave.privacy.ledger.heads import KeyRotation, SignedHead, current_key
from conclave.protocol.plan import Plan

PROTOCOL_VERSION: Literal[2] = 2
QUERY_DESCRIBE = "query.describe"
QUERY_ADMIT = "query.admit"
QUERY_CLOSE = "query.close"
QUERY_CHOOSE = "query.choose"
TRAIN = "train"
EVALUATE = "evaluate"

RunId = Annotated[str, Field(max_length=128, pattern=r"^[0-9A-Za-z_.-]+$")]
"""A run's name in every charge, and before a slash in the names of what a node keeps for it."""

Code = Literal[
    "bad-request",
    "version-mismatch",
    "not-enrolled",
    "schema-mismatch",
    "not-allowed",
    "awaiting-approval",
    "paused",
    "budget-exhausted",
    "already-charged",
    "charge-abandoned",
    "reply-expired",
    "ledger-mismatch",
    "internal-error",
]
CODES: tuple[str, ...] = get_args(Code)
"""Why a node refused. A code never depends on record values or counts, and no other text leaves a node."""


Flaw = Literal["document", "no-tensors", "oversized", "undecodable", "other-tensors", "wrong-shape", "not-finite"]
"""What is wrong with a message that cannot be used. For the receiver's own records; it never travels."""


class ProtocolError(ConclaveError):
    """A message was refused; ``code`` may be sent, the exception's text and its ``flaw`` never are."""

    def __init__(self, code: Code, detail: str = "", flaw: Flaw = "document") -> None:
        super().__init__(detail or code)
        self.code: Code = code
        self.flaw: Flaw = flaw


class DescribeRequest(Frozen):
    """Ask a node what is public about it. With a model, its capacity is for experts of that size."""

    version: Literal[2] = PROTOCOL_VERSION
    model: ModelConfig | None = None


class AdmitRequest(Frozen):
    """Ask before round one whether a plan may run, and whether there is budget for all its rounds.

    scenario: its name, which the owner may have allowed or not. Only the plan itself binds.
    """

    version: Literal[2] = PROTOCOL_VERSION
    run_id: RunId
    scenario: str = Field(max_length=64)
    plan: Plan


class Admission(Frozen):
    """The plan may run; the budget for all its rounds is set aside."""

    version: Literal[2] = PROTOCOL_VERSION
    plan_hash: str = Field(pattern=r"^[0-9a-f]{64}$")


class CloseRequest(Frozen):
    """The run is over: what is still set aside for it is free again."""

    version: Literal[2] = PROTOCOL_VERSION
    run_id: RunId


class Closed(Frozen):
    """Nothing is set aside for the run any more."""

    version: Literal[2] = PROTOCOL_VERSION
    run_id: RunId


class _WithModel(Frozen):
    """A request that travels with the tensors for exactly ``held``.

    receipt: the last one that the server has of the paying ledger. A ledger without it is an older copy.
    """

    version: Literal[2] = PROTOCOL_VERSION
    run_id: RunId
    scenario: str = Field(max_length=64)
    round: int = Field(ge=1)
    plan: Plan
    held: HeldExperts
    receipt: SignedHead | None = None

    def model_in_hash(self, body: bytes) -> str:
        """Identify what is trained on: the weights (their ``body`` on the wire) and which experts they are for."""
        return sha256(self.model_dump_json(include={"held"}).encode() + body)


class TrainRequest(_WithModel):
    """Train one round."""


class EvaluateRequest(_WithModel):
    """Measure the model on held-out units, after a round."""


class ChooseRequest(Frozen):
    """Choose experts before a round. The shared weights and every expert's router row travel with it.

    receipt: as in :class:`TrainRequest`.
    """

    version: Literal[2] = PROTOCOL_VERSION
    run_id: RunId
    scenario: str = Field(max_length=64)
    round: int = Field(ge=1)
    plan: Plan
    receipt: SignedHead | None = None

    def model_in_hash(self, body: bytes) -> str:
        """Identify what is chosen by: the tensors, their ``body`` on the wire."""
        return sha256(body)


class Committed(Frozen):
    """A committed release, which travels with it.

    receipt: the paying ledger's head when it was committed; the server keeps it.
    """

    version: Literal[2] = PROTOCOL_VERSION
    charge_id: str = Field(pattern=r"^[0-9a-f]{64}$")
    receipt: SignedHead


class ChooseReply(Committed):
    """For each layer, ids of experts travel with it, the most wanted first."""


class TrainReply(Committed):
    """The delta for exactly what was sent travels with it."""


class EvaluateReply(Committed):
    """The noised sums travel with it; the ledger is that of the held-out side."""


class LedgerIdentity(Frozen):
    """Which ledger, and whose signature its receipts bear.

    public_key: its first key, which is its permanent identity.
    rotations: how it arrived at the key that it signs with now.
    """

    public_key: str = Field(pattern=r"^[0-9a-f]{64}$")
    rotations: tuple[KeyRotation, ...] = Field(default=(), max_length=64)

    @model_validator(mode="after")
    def _keys_hold(self) -> Self:
        if current_key(self.ledger_id, self.public_key, self.rotations) is None:
            raise ValueError("rotations: a change of keys that both keys did not sign")
        return self

    @property
    def ledger_id(self) -> str:
        """The identity of the node's ledger."""
        return ledger_id_of(self.public_key)

    @property
    def signing_key(self) -> str:
        """The key that its receipts are signed with."""
        return self.rotations[-1].new_key if self.rotations else self.public_key

    @property
    def fingerprint(self) -> str:
        """16 hexadecimal digits of the first key's hash; those of its training ledger identify a node."""
        return fingerprint(self.public_key)


class HeldOutSide(LedgerIdentity):
    """What a node says about its held-out units: their ledger, and their public share of all its units."""

    share: float = Field(gt=0.0, lt=1.0)


class Description(LedgerIdentity):
    """What a node says about itself: public by assumption, never computed from record values. Its keys identify it.

    declared_size: of the units that train.
    held_out: None if the node does not evaluate.
    """

    version: Literal[2] = PROTOCOL_VERSION
    declared_size: int = Field(ge=1, le=10**12)
    expert_capacity: int = Field(ge=1)
    held_out: HeldOutSide | None = None


class Refusal(Frozen):
    """The node refused, and this code is all it says."""

    version: Literal[2] = PROTOCOL_VERSION
    code: Code


def fingerprint(public_key: str) -> str:
    """Return the identity that belongs to a ledger key (hexadecimal Ed25519 public key)."""
    return sha256(bytes.fromhex(public_key))[:16]
