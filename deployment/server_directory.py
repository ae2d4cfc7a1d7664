"""A server's folder: its configuration, its certificates, and where its runs lie."""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from pathlib import Path

from deployment.certificates import Authority, write_secret
from deployment.operator import OPERATOR_FILE, operator_text
from deployment.server_config import ServerConfig, default_text, read_server_config
from model.errors import BadInputError

_LOOPBACK = ("localhost", "127.0.0.1")


class ServerDirectory:
    """The folder that holds a ``server.toml``.

    tls: CA, server certificate and keys. operator: what an operator needs to reach the server; copy it to them.
    state: Flower's database, logs and the proxy's files. runs: a run directory for each run.
    """

    def __init__(self, path: Path) -> None:
        """Read the configuration.

        Raises:
            BadInputError: there is none, or it cannot be used.
        """
        self.path = path.absolute()
        self.config = read_server_config(path / "server.toml")
        self.tls, self.operator = self.path / "tls", self.path / "operator"
        self.state, self.runs = self.path / "state", self.path / "runs"
        self.secret = self.tls / "executor.secret"

    @classmethod
    def create(cls, path: Path, hosts: Sequence[str], *, port: int, days: int) -> ServerDirectory:
        """Write ``server.toml`` and make the CA, the server's certificate and the first operator's.

        Args:
            hosts: names and addresses under which nodes reach the server.
            days: for which the certificates are good.

        Raises:
            BadInputError: the folder is a server's already, or a host or the port is none.
        """
        if (path / "server.toml").exists() or (path / "tls").exists():
            raise BadInputError(f"{path}: is a server's already, must be a new folder")
        config = ServerConfig(hosts=tuple(hosts), port=port)
        tls, operator = path / "tls", path / "operator"
        try:
            for folder in (path, tls, operator, path / "state", path / "runs"):
                folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        except OSError as error:
            raise BadInputError(f"{path}: cannot be created ({error.strerror})") from error
        authority = Authority.create(tls, days=days)
        authority.issue_server(tls / "server", [*hosts, *(h for h in _LOOPBACK if h not in hosts)], days=days)
        authority.issue_operator(operator / "operator", "operator", days=days)
        (operator / "ca.pem").write_bytes(authority.certificate_path.read_bytes())
        (operator / OPERATOR_FILE).write_text(operator_text(hosts[0], port))
        write_secret(tls / "executor.secret", secrets.token_bytes(32))
        (path / "server.toml").write_text(default_text(config))
        return cls(path)
