"""Signed heads: a ledger's owner vouches for everything up to one entry, with one signature.

The chain binds a head to all entries before it, so one Ed25519 signature (RFC 8032) covers them all. A head that
travels with a reply is a receipt.
"""

from __future__ import annotations

from collections.abc import Iterable

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from pydantic import Field

from conclave.base.canonical import canonical_json
from conclave.base.frozen import Frozen

HEX_KEY = r"^[0-9a-f]{64}$"
HEX_SIGNATURE = r"^[0-9a-f]{128}$"

_HEAD = "conclave ledger head"
_ROTATION = "conclave ledger key"


class SignedHead(Frozen):
    """The position and hash of a ledger's last entry (0 and the genesis' hash if there is none), signed."""

    ledger_id: str = Field(pattern=r"^[0-9a-f]{32}$")
    seq: int = Field(ge=0, lt=2**53)
    hash: str = Field(pattern=HEX_KEY)
    signature: str = Field(pattern=HEX_SIGNATURE)

    @classmethod
    def sign(cls, key: Ed25519PrivateKey, ledger_id: str, seq: int, head_hash: str) -> SignedHead:
        """Sign a head."""
        signature = key.sign(_message(_HEAD, ledger_id, seq, head_hash)).hex()
        return cls(ledger_id=ledger_id, seq=seq, hash=head_hash, signature=signature)

    def signed_by(self, public_key: str) -> bool:
        """Whether the signature is that of the given key (hexadecimal)."""
        return _verifies(public_key, self.signature, _message(_HEAD, self.ledger_id, self.seq, self.hash))

    @property
    def line(self) -> bytes:
        """The canonical JSON."""
        return canonical_json(self.model_dump())


class KeyRotation(Frozen):
    """A ledger's signing key was replaced; each of the two keys signed for the change."""

    old_key: str = Field(pattern=HEX_KEY)
    new_key: str = Field(pattern=HEX_KEY)
    by_old: str = Field(pattern=HEX_SIGNATURE)
    by_new: str = Field(pattern=HEX_SIGNATURE)

    @classmethod
    def sign(cls, ledger_id: str, old: Ed25519PrivateKey, new: Ed25519PrivateKey) -> KeyRotation:
        """Rotate from one key to another, signed with both."""
        old_key, new_key = public_hex(old), public_hex(new)
        message = _message(_ROTATION, ledger_id, old_key, new_key)
        return cls(old_key=old_key, new_key=new_key, by_old=old.sign(message).hex(), by_new=new.sign(message).hex())

    def holds(self, ledger_id: str, current_key: str) -> bool:
        """Whether this is a rotation of that ledger away from ``current_key``, signed by both keys."""
        message = _message(_ROTATION, ledger_id, self.old_key, self.new_key)
        return (
            self.old_key == current_key
            and _verifies(self.old_key, self.by_old, message)
            and _verifies(self.new_key, self.by_new, message)
        )


def current_key(ledger_id: str, first_key: str, rotations: Iterable[KeyRotation]) -> str | None:
    """Return the key that a chain of rotations leads to from the first one; None where a link does not hold."""
    key = first_key
    for rotation in rotations:
        if not rotation.holds(ledger_id, key):
            return None
        key = rotation.new_key
    return key


def public_hex(key: Ed25519PrivateKey) -> str:
    """Return the public half as 64 hexadecimal digits."""
    return key.public_key().public_bytes_raw().hex()


def _message(*parts: str | int) -> bytes:
    return canonical_json(list(parts))


def _verifies(public_key: str, signature: str, message: bytes) -> bool:
    try:
        Ed25519PublicKey.from_public_bytes(bytes.fromhex(public_key)).verify(bytes.fromhex(signature), message)
    except (InvalidSignature, ValueError):
        return False
    return True
