"""One spelling for every document that is hashed: canonical JSON, decimal strings, SHA-256.

Whatever a ledger holds is spelled as RFC 8785 says, so any implementation of that can check its hashes; tests compare
with the package ``rfc8785``. That package is not used here. It would replace one call of ``json.dumps``, takes three
times as long, and has another domain: it spells the float 1.0 as the integer 1, where a hash must tell them apart, and
refuses integers from 2**53 on. Keys with characters beyond U+FFFF, which no ledger has, it sorts by UTF-16.
"""

from __future__ import annotations

import hashlib
import json
from decimal import Decimal


def decimal(value: float) -> str:
    """Return the shortest exact decimal spelling of a float, without an exponent for ordinary sizes."""
    text = format(Decimal(repr(float(value))), "f")
    return text.rstrip("0").rstrip(".") if "." in text else text


def canonical_json(document: object) -> bytes:
    """Return JSON with sorted keys and no spaces. Floats are refused: spell them with :func:`decimal`.

    Raises:
        TypeError: the document holds a float or something that JSON cannot carry.
        UnicodeEncodeError: a string in it holds a lone surrogate, as names and paths in other encodings do.
    """
    _refuse_floats(document)
    return json.dumps(document, sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode()


def _refuse_floats(value: object) -> None:
    if isinstance(value, float):
        raise TypeError("a float has no canonical spelling; use decimal()")
    if isinstance(value, dict):
        for item in value.values():
            _refuse_floats(item)
    elif isinstance(value, list | tuple):
        for item in value:
            _refuse_floats(item)


def sha256(content: bytes) -> str:
    """Return the lower-case hexadecimal SHA-256 of ``content``."""
    return hashlib.sha256(content).hexdigest()
