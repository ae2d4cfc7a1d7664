"""Ask a running node or server of this machine whether it is well."""

from __future__ import annotations

import json
import urllib.error
import urllib.request

from clients.operations_config import MonitoringConfig
from deployment.monitoring import HOST
from model.errors import BadInputError

_PATIENCE_S = 5.0


def ask_health(config: MonitoringConfig, *, where: str) -> dict[str, bool]:
    """Return what → whether it is as it should be.

    Args:
        where: names the configuration file in errors.

    Raises:
        BadInputError: no port is configured, or nobody answers there as a node or a server would.
    """
    port = config.metrics_port
    if port is None:
        raise BadInputError(f"{where}: no monitoring.metrics_port, must be set and the process started again")
    direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with direct.open(f"http://{HOST}:{port}/health", timeout=_PATIENCE_S) as answer:
            body = answer.read(1 << 16)
    except urllib.error.HTTPError as error:
        with error:
            body = error.read(1 << 16)
    except OSError as error:
        raise BadInputError(f"{where}: nobody answers on port {port}, must be running") from error
    try:
        found = json.loads(body)
        return {str(name): bool(well) for name, well in found.items()}
    except (ValueError, AttributeError) as error:
        raise BadInputError(f"{where}: another program answers on port {port}") from error
