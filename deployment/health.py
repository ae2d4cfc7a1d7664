"""Ask a running node or server on this machine whether all is well."""

from __future__ import annotations

import http.client
import json
import urllib.error
import urllib.request
from pathlib import Path

from conclave.base.errors import BadInputError, UnavailableError
from conclave.clients.folder.node_config import read_node_config
from conclave.clients.operations_config import MonitoringConfig
from conclave.deployment.host.monitoring import HOST
from conclave.deployment.server.config import read_server_config

_PATIENCE_S = 5.0
_MOST_BYTES = 1 << 16


def ask_health(folder: Path) -> dict[str, bool]:
    """Return what → whether it is as it should be.

    Args:
        folder: of a node or a server.

    Raises:
        BadInputError: it is neither's, or no port is configured.
        UnavailableError: nobody answers there as a node or a server would.
    """
    where, config = _monitoring(folder)
    port = config.metrics_port
    if port is None:
        raise BadInputError(f"{where}: no monitoring.metrics_port, must be set and the process started again")
    try:
        found = json.loads(_answer(port))
        return {str(name): bool(well) for name, well in found.items()}
    except OSError as error:
        raise UnavailableError(f"{where}: nobody answers on port {port}, must be running") from error
    except (http.client.HTTPException, ValueError, AttributeError, RecursionError) as error:
        raise UnavailableError(f"{where}: another program answers on port {port}") from error


def _answer(port: int) -> bytes:
    direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with direct.open(f"http://{HOST}:{port}/health", timeout=_PATIENCE_S) as answer:
            return bytes(answer.read(_MOST_BYTES))
    except urllib.error.HTTPError as error:
        with error:
            return error.read(_MOST_BYTES)


def _monitoring(folder: Path) -> tuple[Path, MonitoringConfig]:
    node, server = folder / "node.toml", folder / "server.toml"
    if node.is_file():
        return node, read_node_config(node).monitoring
    if server.is_file():
        return server, read_server_config(server).monitoring
    raise BadInputError(f"{folder}: neither node.toml nor server.toml here, must be a node's or a server's folder")
