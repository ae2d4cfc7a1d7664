"""The ledger's signing key on disk: PEM, readable by its owner only, never part of a message or a log."""

from __future__ import annotations

import stat
from pathlib import Path

from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat, load_pem_private_key

from conclave.base.errors import BadInputError
from conclave.base.whole_file import new_file


class DamagedKeyError(BadInputError):
    """What is there is not a key: another file, or only the beginning of one."""


def create_key(path: Path) -> Ed25519PrivateKey:
    """Generate a key and write it to a new file with mode 0600, durably: a ledger that it signs is lost without it.

    Raises:
        BadInputError: the file exists or cannot be written.
    """
    key = Ed25519PrivateKey.generate()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with new_file(path, mode=0o600) as stream:
            stream.write(key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))
    except OSError as error:
        raise BadInputError(f"{path}: cannot be created ({error.strerror}), must be a new file") from error
    return key


def load_key(path: Path) -> Ed25519PrivateKey:
    """Read a key.

    Raises:
        DamagedKeyError: it is not an Ed25519 key.
        BadInputError: it is missing, or others may read it.
    """
    try:
        mode = stat.S_IMODE(path.stat().st_mode)
        content = path.read_bytes()
    except OSError as error:
        raise BadInputError(f"{path}: cannot be read ({error.strerror}), must be the ledger's key") from error
    if mode & 0o077:
        raise BadInputError(f"{path}: has mode {mode:04o}, must be 0600: nobody else may read a key")
    try:
        key = load_pem_private_key(content, password=None)
    except (ValueError, TypeError, UnsupportedAlgorithm):
        key = None
    if not isinstance(key, Ed25519PrivateKey):
        raise DamagedKeyError(f"{path}: not a key, must be an Ed25519 private key in PEM")
    return key
