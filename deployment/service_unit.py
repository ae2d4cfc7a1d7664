"""Units for systemd: a node or a server that starts with its machine and may do no more than it must."""

from __future__ import annotations

import re
import sys
from collections.abc import Sequence
from pathlib import Path

from conclave.base.errors import BadInputError
from conclave.clients.folder.node_directory import NodeDirectory
from conclave.deployment.server.directory import ServerDirectory

ENVIRONMENT_FILE = "/etc/conclave/environment"
"""Where an administrator may put HTTPS_PROXY and the like; need not exist."""

_BESIDE_TRAINING_MB = 1024
"""For what else runs in a node: Flower's SuperNode, and pages of files."""
_PRIVILEGED_PORTS = 1024


def node_unit(directory: NodeDirectory, user: str) -> str:
    """Return the unit of a node. It may write to its state and its witnesses' folder, and nowhere else.

    Raises:
        BadInputError: a path or the user has a character that systemd would read as something else.
    """
    folder, config = directory.path.absolute(), directory.config
    limits = []
    if config.limits.threads is not None:
        limits.append(f"CPUQuota={100 * config.limits.threads}%")
    if config.limits.memory_mb is not None:
        limits.append(f"MemoryMax={config.limits.memory_mb + _BESIDE_TRAINING_MB}M")
    return _unit(
        "node",
        folder,
        user,
        needs=[folder / config.dataset.data],
        writes=[folder / config.storage.state, (folder / config.storage.witness).parent],
        settings=[*limits, "CapabilityBoundingSet="],
    )


def server_unit(directory: ServerDirectory, user: str) -> str:
    """Return the unit of a server. It may write to its state and its runs. Raises as :func:`node_unit`."""
    settings = ["CapabilityBoundingSet="]
    if directory.config.port < _PRIVILEGED_PORTS:
        settings = ["AmbientCapabilities=CAP_NET_BIND_SERVICE", "CapabilityBoundingSet=CAP_NET_BIND_SERVICE"]
    return _unit("server", directory.path, user, needs=[], writes=[directory.state, directory.runs], settings=settings)


def _unit(
    kind: str, folder: Path, user: str, *, needs: Sequence[Path], writes: Sequence[Path], settings: Sequence[str]
) -> str:
    program = Path(sys.executable).with_name("conclave")
    mounts = " ".join(_quoted(path) for path in (folder, *needs, *writes))
    lines = [
        "[Unit]",
        f"Description=Conclave {kind} {_plain(folder.name)}",
        "Wants=network-online.target",
        "After=network-online.target",
        "# A disk that is not there yet is not an empty one.",
        f"RequiresMountsFor={mounts}",
        "",
        "[Service]",
        "Type=exec",
        f"User={_plain(user)}",
        f"ExecStart={_quoted(program)} {kind} start {_quoted(folder)}",
        "Restart=on-failure",
        "RestartSec=10",
        "# Bad input: starting again would not help.",
        "RestartPreventExitStatus=2",
        "TimeoutStopSec=60",
        f"EnvironmentFile=-{ENVIRONMENT_FILE}",
        *settings,
        f"ReadWritePaths={' '.join(_quoted(path) for path in writes)}",
        "ProtectSystem=strict",
        "ProtectHome=read-only",
        "PrivateTmp=yes",
        "ProtectClock=yes",
        "ProtectControlGroups=yes",
        "ProtectKernelLogs=yes",
        "ProtectKernelModules=yes",
        "ProtectKernelTunables=yes",
        "NoNewPrivileges=yes",
        "RestrictAddressFamilies=AF_INET AF_INET6 AF_UNIX",
        "RestrictNamespaces=yes",
        "RestrictSUIDSGID=yes",
        "LockPersonality=yes",
        "UMask=0077",
        "",
        "[Install]",
        "WantedBy=multi-user.target",
    ]
    return "\n".join(lines) + "\n"


def _quoted(path: Path) -> str:
    return f'"{_plain(str(path))}"'


def _plain(text: str) -> str:
    if not re.fullmatch(r"[A-Za-z0-9 /._@+:,=~-]+", text):
        raise BadInputError(
            f"{text}: cannot stand in a systemd unit, must be letters, digits, spaces and any of /._@+:,=~-"
        )
    return text
