"""Flower's SuperNode, in a process that ends with its connection: ``python -P -m deployment.supernode ARGUMENTS``.

Where a connection breaks during a TLS handshake, Flower's own gives up but lives on, for the thread that hands tasks
out keeps the process: a node that never comes back, and that nobody starts again.
"""

from __future__ import annotations

import os
import sys
from importlib.metadata import entry_points


def main() -> None:
    """Run it with this process's arguments, and do not outlive it."""
    sys.argv[0] = "flower-supernode"
    (script,) = entry_points(group="console_scripts", name=sys.argv[0])
    script.load()()
    sys.stderr.write("the connection to the server is lost\n")
    sys.stderr.flush()
    os._exit(1)  # a thread would keep the process


if __name__ == "__main__":
    main()
