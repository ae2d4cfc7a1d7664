"""Messages to Flower records and back: what arrives is hostile until it has been checked here.

Each message is a Flower ``RecordDict`` with one JSON document and, where tensors travel, one safetensors blob
carried as a Flower array. Decoding checks sizes, names, shapes and types before anything is used, and never unpickles.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TypeVar

import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, RecordDict
from pydantic import ConfigDict, ValidationError
from safetensors import SafetensorError
from safetensors.torch import load
from torch import Size, Tensor

from conclave.base.frozen import Frozen
from conclave.protocol.encodings import Encoding, WireForm, wire_form
from conclave.protocol.messages import PROTOCOL_VERSION, Code, ProtocolError, Refusal
from conclave.protocol.tensor_array import STYPE, TensorArray

_Document = TypeVar("_Document", bound=Frozen)


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

    A sender in this very process may have shared them; they are checked nevertheless and must not be changed.

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
        encodings: name → how it must have travelled; float32 if none is given.

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
