"""The certificate for what a server says to itself: proxy, SuperLink and runs, over loopback.

It is nobody else's business, so it comes from no CA that others trust, lasts as long as the server runs, and a
renewal of the certificate that nodes and operators see touches no connection here.
"""

from __future__ import annotations

import shutil
from pathlib import Path

from conclave.deployment.host.certificates import Authority

LOOPBACK = "loopback"
"""The folder in a server's state: ``ca.pem``, ``server.pem`` and ``server.key``."""

_DAYS = 3650
_HOSTS = ("localhost", "127.0.0.1")


def make_certificate(state: Path) -> None:
    """Make a new one, in place of the last start's. The key that signed it is not kept."""
    folder = state / LOOPBACK
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(mode=0o700)
    authority = Authority.create(folder, days=_DAYS)
    authority.issue_server(folder / "server", _HOSTS, days=_DAYS)
    (folder / "ca.key").unlink()
