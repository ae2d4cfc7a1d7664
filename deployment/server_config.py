"""``server.toml``: where a server listens and what it allows, read at every start."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from pydantic import Field, ValidationError

from clients.node_config import MONITORING_TEXT
from clients.operations_config import MonitoringConfig
from model.config import Frozen
from model.errors import BadInputError
from model.explain import explain
from model.toml_file import read_toml

Port = Annotated[int, Field(ge=1, le=65_535)]


class ServerConfig(Frozen):
    """How a server is reached.

    hosts: names and addresses that its certificate is for; the first one is what operators are told.
    port: where nodes and operators connect, over TLS. bind: the address that the proxy listens on.
    internal_port: of Flower's SuperLink, on loopback only.
    max_message_mb: MiB of one request; a larger one is refused before it is read.
    monitoring: how the server is watched.
    """

    hosts: tuple[str, ...] = Field(strict=False, min_length=1)
    bind: str = "0.0.0.0"  # noqa: S104  (the proxy is what faces the network)
    port: Port = 9443
    internal_port: Port = 9091
    max_message_mb: int = Field(default=1024, ge=1, le=1_000_000)
    monitoring: MonitoringConfig = MonitoringConfig()


def read_server_config(path: Path) -> ServerConfig:
    """Read ``server.toml``.

    Raises:
        BadInputError: one sentence that names the file, the key, the value and what is allowed.
    """
    try:
        return ServerConfig.model_validate(read_toml(path, "a server's configuration"))
    except ValidationError as error:
        raise BadInputError(f"{path}: {explain(error, ServerConfig)}") from error


def default_text(config: ServerConfig) -> str:
    """Return a commented ``server.toml``."""
    hosts = ", ".join(f'"{host}"' for host in config.hosts)
    return f"""# A Conclave server. Nodes and operators reach it on one port, over TLS.

# Names and addresses in its certificate. A change here does not change the certificate.
hosts = [{hosts}]
# What the proxy listens on.
bind = "{config.bind}"
port = {config.port}
# Flower's SuperLink, on loopback only.
internal_port = {config.internal_port}
# MiB of one request.
max_message_mb = {config.max_message_mb}

{MONITORING_TEXT}"""
