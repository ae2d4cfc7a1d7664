"""Where a server is reached, as people write it: ``host:port``."""

from __future__ import annotations

import ipaddress
import re
from typing import Annotated

from pydantic import AfterValidator

_LONGEST_NAME = 253
_LABEL = r"[A-Za-z0-9]([A-Za-z0-9-]{0,61}[A-Za-z0-9])?"
_LARGEST_PORT = 65_535


def check_address(text: str) -> str:
    """Return an address of a server as it was given: ``name:port``, ``1.2.3.4:port`` or ``[::1]:port``.

    Raises:
        ValueError: it is not an address.
    """
    found = re.fullmatch(r"(?:\[([0-9A-Fa-f:.]+)\]|([A-Za-z0-9.-]+)):([0-9]{1,5})", text)
    if found is None or not _is_host(found[1], found[2]) or not 1 <= int(found[3]) <= _LARGEST_PORT:
        raise ValueError("must be host:port, like fed.example.org:9443")
    return text


def is_host_name(text: str) -> bool:
    """Return whether this may be a name in the DNS; a name that ends in a number would be taken for an IPv4 address."""
    labels = text.split(".")
    sound = all(re.fullmatch(_LABEL, label) for label in labels)
    return sound and len(text) <= _LONGEST_NAME and not labels[-1].isdigit()


def _is_host(ipv6: str | None, other: str) -> bool:
    try:
        return ipaddress.ip_address(ipv6 or other).version == (4 if ipv6 is None else 6)
    except ValueError:
        return ipv6 is None and is_host_name(other)


ServerAddress = Annotated[str, AfterValidator(check_address)]
"""``host:port``."""
