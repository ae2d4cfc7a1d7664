"""``server.toml``: where a server listens and what it allows, read at every start."""

from __future__ import annotations

import ipaddress
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Self

from pydantic import AfterValidator, Field, ValidationError, model_validator

from conclave.base.errors import BadInputError
from conclave.base.explain import explain
from conclave.base.frozen import Frozen
from conclave.base.toml_file import read_toml
from conclave.clients.folder.node_config import MONITORING_TEXT
from conclave.clients.folder.toml_line import toml_line
from conclave.clients.operations_config import MonitoringConfig

Port = Annotated[int, Field(ge=1, le=65_535)]


def _ip(text: str) -> str:
    """Refuse names, which nginx would look up when it starts, and zones (``%eth0``), which it does not know."""
    try:
        if "%" not in text:
            ipaddress.ip_address(text)
            return text
    except ValueError:
        pass
    raise ValueError(f"bind is {text!r}, must be an IP address, like 0.0.0.0 or ::1")


class ServerConfig(Frozen):
    """How a server is reached.

    hosts: names and addresses that its certificate is for; the first one is what operators are told.
    port: where nodes and operators connect, over TLS. bind: the IP address that the proxy listens on.
    internal_port: of Flower's SuperLink, on loopback only.
    max_message_mb: MiB of one request; a larger one is refused before it is read.
    monitoring: how the server is watched.
    """

    hosts: tuple[str, ...] = Field(strict=False, min_length=1)
    bind: Annotated[str, AfterValidator(_ip)] = "0.0.0.0"  # noqa: S104  (the proxy is what faces the network)
    port: Port = 9443
    internal_port: Port = 9091
    max_message_mb: int = Field(default=1024, ge=1, le=1_000_000)
    monitoring: MonitoringConfig = MonitoringConfig()

    @model_validator(mode="after")
    def _has_a_port_for_each(self) -> Self:
        taken = {self.port: "port"}
        others = (("internal_port", self.internal_port), ("monitoring.metrics_port", self.monitoring.metrics_port))
        for key, port in others:
            if port in taken:
                raise ValueError(f"{key} is {port}, must be another than {taken[port]}")
            if port is not None:
                taken[port] = key
        return self

    @property
    def listens_on(self) -> str:
        """Address and port of the proxy, as nginx and a URL spell them."""
        return f"[{self.bind}]:{self.port}" if ":" in self.bind else f"{self.bind}:{self.port}"


def read_server_config(path: Path) -> ServerConfig:
    """Read ``server.toml``.

    Raises:
        BadInputError: one sentence that names the file, the key, the value and what is allowed.
    """
    return parse_server_config(read_toml(path, "a server's configuration"), where=str(path))


def parse_server_config(document: Mapping[str, object], *, where: str) -> ServerConfig:
    """Check a configuration; ``where`` names its origin in errors. Raises as :func:`read_server_config`."""
    try:
        return ServerConfig.model_validate(document)
    except ValidationError as error:
        raise BadInputError(f"{where}: {explain(error, ServerConfig)}") from error


def default_text(config: ServerConfig) -> str:
    """Return a commented ``server.toml``."""
    return f"""# A Conclave server. Nodes and operators reach it on one port, over TLS.

# Names and addresses in its certificate. A change here does not change the certificate.
{toml_line("hosts", list(config.hosts))}
# What the proxy listens on: an IP address, and a port.
{toml_line("bind", config.bind)}
{toml_line("port", config.port)}
# Flower's SuperLink, on loopback only.
{toml_line("internal_port", config.internal_port)}
# MiB of one request.
{toml_line("max_message_mb", config.max_message_mb)}

{MONITORING_TEXT}"""
