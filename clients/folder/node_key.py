"""The key with which a node proves itself to a server; unlike the ledger's key, it signs nothing that is kept."""

from __future__ import annotations

import stat
from pathlib import Path

from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec

from conclave.base.errors import BadInputError
from conclave.base.reading import without_mark
from conclave.base.whole_file import new_file


def check_node_key(path: Path) -> None:
    """Check that a node can prove itself with a key.

    Raises:
        BadInputError: it is missing, cannot be read, is not such a key, others can read it, or it is not that of the
            ``.pub`` beside it.
    """
    again = f"ssh-keygen -t ecdsa -b 384 -N '' -f {path} makes another, which an operator enrols"
    try:
        key = serialization.load_ssh_private_key(path.read_bytes(), password=None)
        public = path.with_name(f"{path.name}.pub")
        stated = serialization.load_ssh_public_key(_public_line(public)) if public.exists() else None
    except (FileNotFoundError, ValueError, TypeError, UnsupportedAlgorithm) as error:
        raise BadInputError(f"{path}: missing or no key; copy it back, or {again}") from error
    except OSError as error:  # it may be right: another one would lock the node out
        unread = error.filename or path
        raise BadInputError(f"{unread}: cannot be read ({error.strerror}), must be readable for this user") from error
    if not isinstance(key, ec.EllipticCurvePrivateKey):
        raise BadInputError(f"{path}: another kind of key; {again}")
    if stat.S_IMODE(path.stat().st_mode) & 0o077:
        raise BadInputError(f"{path}: others can read it; chmod 600 {path}")
    if stated is not None and stated != key.public_key():
        raise BadInputError(f"{path}: is not the private half of {public}, which an operator enrolled; copy it back")


def _public_line(path: Path) -> bytes:
    """Return what a ``.pub`` file says, however an editor or a mail program saved it."""
    return without_mark(path.read_bytes()).strip()


def create_node_key(path: Path) -> Path:
    """Make the key with which a node proves itself, EC P-384 in OpenSSH's format, and its public half ``.pub``.

    The private half comes last, so that an interrupted attempt left no key without its public half.

    Returns:
        The path of the public half, which the server's operator enrols.

    Raises:
        FileExistsError: there is a key.
    """
    key = ec.generate_private_key(ec.SECP384R1())
    private = key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.OpenSSH, serialization.NoEncryption()
    )
    public = path.with_name(f"{path.name}.pub")
    with new_file(path, mode=0o600) as stream:
        stream.write(private)
        public.write_bytes(
            key.public_key().public_bytes(serialization.Encoding.OpenSSH, serialization.PublicFormat.OpenSSH) + b"\n"
        )
    return public
