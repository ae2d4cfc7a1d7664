"""Messages between server and nodes: typed, versioned, and nothing in them that is not declared here.

Each message is a Flower ``RecordDict`` with one JSON document and, where tensors travel, one safetensors blob
carried as a Flower array. Both sides treat what they receive as hostile: decoding checks sizes, names, shapes
and types before anything is used, and never unpickles.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Annotated, Literal, Self, TypeVar, get_args

import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, RecordDict
from pydantic import ConfigDict, Field, ValidationError, model_validator
from safetensors import SafetensorError
from safetensors.torch import load
from torch import Size, Tensor

from clients.charges import PlannedCharges, charges_of
from clients.encodings import (
    Encoding,
    TrafficConfig,
    WireForm,
    encodings_of,
    error_bounds,
    norm_growth,
    wire_form,
)
from clients.plan import Plan, TrainingConfig
from clients.tensor_array import STYPE, TensorArray, pack
from model.config import Frozen, HeldExperts, ModelConfig
from privacy.canonical import sha256
from privacy.ledger.entry import ledger_id_of
from privacy.ledger.heads import KeyRotation, SignedHead, current_key

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
"""Why a node refused. A code never depends on record values or counts, and no other text leaves a node."""


Flaw = Literal["document", "no-tensors", "oversized", "undecodable", "other-tensors", "wrong-shape", "not-finite"]
"""What is wrong with a message that cannot be used. For the receiver's own records; it never travels."""


class ProtocolError(Exception):
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
    """A request beside which the tensors for exactly ``held`` travel.

    receipt: the last one that the server has of the ledger that pays. A ledger that does not have it is an older copy.
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
    """Choose experts before a round. The shared weights and every expert's router row travel beside it.

    receipt: as in :class:`TrainRequest`.
    """

    version: Literal[2] = PROTOCOL_VERSION
    run_id: RunId
    scenario: str = Field(max_length=64)
    round: int = Field(ge=1)
    plan: Plan
    receipt: SignedHead | None = None


class _Committed(Frozen):
    """A committed release, which travels beside it.

    receipt: the paying ledger's head when it was committed; the server keeps it.
    """

    version: Literal[2] = PROTOCOL_VERSION
    charge_id: str = Field(pattern=r"^[0-9a-f]{64}$")
    receipt: SignedHead


class ChooseReply(_Committed):
    """For each layer, ids of experts travel beside it, the most wanted first."""


class TrainReply(_Committed):
    """The delta for exactly what was sent travels beside it."""


class EvaluateReply(_Committed):
    """The noised sums travel beside it; the ledger is that of the held-out side."""


class LedgerIdentity(Frozen):
    """Which ledger, and whose signature its receipts bear.

    public_key: its first key, which is its identity for good.
    rotations: how it came to the key it signs with now.
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
    held_out: None where the node does not evaluate.
    """

    version: Literal[2] = PROTOCOL_VERSION
    declared_size: int = Field(ge=1, le=10**12)
    expert_capacity: int = Field(ge=1)
    held_out: HeldOutSide | None = None


class Refusal(Frozen):
    """The node refused, and this code is all it says."""

    version: Literal[2] = PROTOCOL_VERSION
    code: Code


_Document = TypeVar("_Document", bound=Frozen)


def fingerprint(public_key: str) -> str:
    """Return the identity that belongs to a ledger key (hexadecimal Ed25519 public key)."""
    return sha256(bytes.fromhex(public_key))[:16]


def encode(document: Frozen, tensors: bytes | Mapping[str, Tensor] | ArrayRecord | None = None) -> RecordDict:
    """Build the content of a Flower message.

    Args:
        tensors: packed bytes, or tensors that are packed only if the message leaves this process; in that case
            neither side may change them in place. Several messages may share what :func:`encode_tensors` made.
    """
    content = RecordDict({"document": ConfigRecord({"json": document.model_dump_json()})})
    if tensors is not None:
        content["tensors"] = tensors if isinstance(tensors, ArrayRecord) else encode_tensors(tensors)
    return content


def encode_tensors(tensors: bytes | Mapping[str, Tensor]) -> ArrayRecord:
    """Build the record in which tensors travel; see :func:`encode`."""
    record = ArrayRecord()
    # Item assignment keeps the array as it is; the constructor would copy it.
    record["body"] = (
        Array(dtype="uint8", shape=(len(tensors),), stype=STYPE, data=tensors)
        if isinstance(tensors, bytes)
        else TensorArray(tensors)
    )
    return record


def decode(content: RecordDict, kind: type[_Document]) -> _Document:
    """Read the document of a message.

    Raises:
        ProtocolError: ``version-mismatch``, or ``bad-request`` for anything that is not a ``kind``; if the
            message is a refusal, with the refusal's code.
    """
    record = content.get("document")
    text = record.get("json") if isinstance(record, ConfigRecord) else None
    if not isinstance(text, str):
        raise ProtocolError("bad-request", "the message has no document")
    try:
        return kind.model_validate_json(text)
    except ValidationError as error:
        raise ProtocolError(_why_invalid(text), f"the document is no {kind.__name__}") from error


def refusal_code(content: RecordDict) -> Code | None:
    """Return the code of a refusal; None for any other message."""
    record = content.get("document")
    text = record.get("json") if isinstance(record, ConfigRecord) else None
    try:
        return Refusal.model_validate_json(text).code if isinstance(text, str) else None
    except ValidationError:
        return None


def _why_invalid(text: str) -> Code:
    try:
        return Refusal.model_validate_json(text).code
    except ValidationError:
        pass
    try:
        version = _Versioned.model_validate_json(text).version
    except ValidationError:
        return "bad-request"
    return "bad-request" if version == PROTOCOL_VERSION else "version-mismatch"


class _Versioned(Frozen):
    model_config = ConfigDict(frozen=True, extra="ignore")
    version: int


def lengths(content: RecordDict) -> tuple[int, ...]:
    """Return what the encoded size of a message depends on: lengths of document and blob, characters escaped."""
    document, tensors = content.get("document"), content.get("tensors")
    text = document.get("json") if isinstance(document, ConfigRecord) else None
    blob = tensors.get("body") if isinstance(tensors, ArrayRecord) else None
    text = text if isinstance(text, str) else ""
    return (len(text.encode()), text.count('"') + text.count("\\"), -1 if blob is None else len(blob.data))


def body_of(content: RecordDict) -> bytes:
    """Return the blob of a message.

    Raises:
        ProtocolError: ``bad-request``, there is none.
    """
    return array_of(content).data


def tensors_of(
    content: RecordDict, expected: Mapping[str, Size], encodings: Mapping[str, Encoding] | None = None
) -> dict[str, Tensor]:
    """Return the tensors of a message, which must be exactly ``expected``; see :func:`unpack`.

    A sender in this very process may have shared them; they are checked all the same and must not be changed.

    Raises:
        ProtocolError: ``bad-request``.
    """
    blob = array_of(content)
    if not isinstance(blob, TensorArray):
        return unpack(blob.data, expected, encodings)
    tensors = _checked(blob.tensors, wire_form(expected, encodings or {}))
    if not blob.found_finite:  # a broadcast is looked at once, not once per node
        _check_finite(tensors)
        blob.found_finite = True
    return tensors


def array_of(content: RecordDict) -> Array:
    """Return the array in which a message's tensors travel.

    Raises:
        ProtocolError: ``bad-request``, there is none.
    """
    record = content.get("tensors")
    blob = record.get("body") if isinstance(record, ArrayRecord) else None
    if blob is None or blob.stype != STYPE:
        raise ProtocolError("bad-request", "the message has no tensors", "no-tensors")
    return blob


def unpack(
    body: bytes, expected: Mapping[str, Size], encodings: Mapping[str, Encoding] | None = None
) -> dict[str, Tensor]:
    """Decode a blob that must hold exactly ``expected`` (name → shape), finite, of norm below 1e19.

    Args:
        encodings: name → how it must have travelled; float32 where none is given.

    Returns:
        Name → float32.

    Raises:
        ProtocolError: ``bad-request``.
    """
    form = wire_form(expected, encodings or {})
    size = sum(shape.numel() * form.dtypes[name].itemsize for name, shape in form.shapes.items())
    allowed = size + 4096 + 256 * len(form.shapes)
    if len(body) > allowed:
        raise ProtocolError("bad-request", f"{len(body)} bytes, must be at most {allowed}", "oversized")
    try:
        tensors = load(body)
    except (SafetensorError, ValueError, KeyError, TypeError) as error:
        raise ProtocolError("bad-request", "the tensors cannot be decoded", "undecodable") from error
    decoded = _checked(tensors, form)
    _check_finite(decoded)
    return decoded


def _checked(tensors: Mapping[str, Tensor], form: WireForm) -> dict[str, Tensor]:
    if tensors.keys() != form.shapes.keys():
        raise ProtocolError("bad-request", "the tensors are not those that were asked for", "other-tensors")
    for name, tensor in tensors.items():
        if tensor.shape != form.shapes[name] or tensor.dtype != form.dtypes[name]:
            raise ProtocolError("bad-request", f"{name} has the wrong shape or type", "wrong-shape")
    try:
        return form.decode(tensors)
    except ValueError as error:
        raise ProtocolError("bad-request", str(error), "undecodable") from error


def _check_finite(tensors: Mapping[str, Tensor]) -> None:
    # One vectorised pass: a norm is finite where every value is, and where none is so large (above 1e19) that its
    # square overflows, which no honest weight or delta comes near.
    finite = [math.isfinite(value) for value in norms(tensors)]
    if not all(finite):
        raise ProtocolError("bad-request", f"{list(tensors)[finite.index(False)]} is not finite", "not-finite")


def norms(tensors: Mapping[str, Tensor]) -> list[float]:
    """Return the L2 norm of each tensor, taken in float32."""
    with torch.no_grad():
        each = torch._foreach_norm(list(tensors.values())) if tensors else ()
        return [float(value) for value in each]


CODES: tuple[str, ...] = get_args(Code)

__all__ = [
    "CODES", "EVALUATE", "PROTOCOL_VERSION", "QUERY_ADMIT", "QUERY_CHOOSE", "QUERY_CLOSE", "QUERY_DESCRIBE", "TRAIN",
    "Admission", "AdmitRequest", "ChooseReply", "ChooseRequest",
    "CloseRequest", "Closed", "Code", "DescribeRequest", "Description", "Encoding", "EvaluateReply", "EvaluateRequest",
    "Flaw", "HeldOutSide", "LedgerIdentity",
    "Plan", "PlannedCharges", "ProtocolError", "Refusal",
    "TrafficConfig", "TrainReply", "TrainRequest", "TrainingConfig", "array_of", "body_of", "charges_of", "decode",
    "encode", "encode_tensors", "encodings_of", "error_bounds", "fingerprint", "lengths", "norm_growth", "norms",
    "pack", "tensors_of", "unpack", "wire_form",
]  # fmt: skip
