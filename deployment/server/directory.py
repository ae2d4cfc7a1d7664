"""A server's folder: its configuration, its certificates, and where its runs lie."""

from __future__ import annotations

import re
import secrets
from collections.abc import Sequence
from pathlib import Path

from conclave.base.errors import BadInputError
from conclave.base.whole_file import write_atomically
from conclave.clients.folder.folder_owner import check_owner
from conclave.deployment.host.certificates import Authority, check_host
from conclave.deployment.operator.profile import OPERATOR_FILE, operator_text
from conclave.deployment.server.config import ServerConfig, default_text, read_server_config

_LOOPBACK = ("localhost", "127.0.0.1")
_CA_DAYS = 3650


class ServerDirectory:
    """The folder that holds a ``server.toml``.

    tls: CA, server certificate and keys. operator: what an operator needs to reach the server; copy it to them.
    state: Flower's database, logs and the proxy's files. runs: a run directory for each run.
    """

    def __init__(self, path: Path) -> None:
        """Read the configuration.

        Raises:
            BadInputError: there is none, it cannot be used, or the server is another user's.
        """
        self.path = path.absolute()
        self.config = read_server_config(path / "server.toml")
        self.tls, self.operator = self.path / "tls", self.path / "operator"
        self.state, self.runs = self.path / "state", self.path / "runs"
        self.secret = self.tls / "executor.secret"
        check_owner(self.state if self.state.exists() else self.path)

    @classmethod
    def create(cls, path: Path, hosts: Sequence[str], *, port: int, days: int) -> ServerDirectory:
        """Make the CA, the server's certificate and the first operator's, and write ``server.toml``.

        That file comes last: without it a CA is what an interrupted attempt left, and is kept.

        Args:
            hosts: names and addresses under which nodes reach the server.
            days: how long certificates are valid; the CA is for at least ten years, or every node would need a new one.

        Raises:
            BadInputError: the folder already is a server's or another user's, or a host or the port is not valid.
        """
        if (path / "server.toml").exists():
            raise BadInputError(f"{path}: is a server's already, must be a new folder")
        for host in hosts:
            check_host(host)
        config = ServerConfig(hosts=tuple(hosts), port=port)
        tls, operator, state = path / "tls", path / "operator", path / "state"
        if state.exists():
            check_owner(state)
        try:
            for folder in (path, tls, operator, state, path / "runs"):
                folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        except OSError as error:
            raise BadInputError(f"{path}: cannot be created ({error.strerror})") from error
        authority = Authority.create(tls, days=max(days, _CA_DAYS))
        authority.issue_server(tls / "server", [*hosts, *(h for h in _LOOPBACK if h not in hosts)], days=days)
        write_atomically(tls / "executor.secret", secrets.token_bytes(32), mode=0o600)
        _hand_out(authority, config, "operator", operator, days=days)
        write_atomically(path / "server.toml", default_text(config).encode())
        return cls(path)

    def renew(self, *, days: int) -> None:
        """Replace the server's certificate and key; names and addresses are those of ``server.toml``.

        Raises:
            BadInputError: the CA's key is not there, or a host is not valid.
        """
        hosts = self.config.hosts
        Authority(self.tls).issue_server(
            self.tls / "server", [*hosts, *(h for h in _LOOPBACK if h not in hosts)], days=days
        )

    def add_operator(self, name: str, folder: Path, *, days: int) -> None:
        """Write what an operator needs to ``folder``, and keep their certificate, to be able to revoke it.

        Raises:
            BadInputError: there is an operator of this name, the folder is not empty, or the CA's key is not there.
        """
        kept = _certificate_of(self.tls, name)
        if kept.exists():
            raise BadInputError(f"operator {name}: has a certificate already, must be another name, or be revoked")
        if folder.exists() and any(folder.iterdir()):
            raise BadInputError(f"{folder}: is not empty, must be a new folder")
        authority = Authority(self.tls)
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        _hand_out(authority, self.config, name, folder, days=days)

    def revoke_operator(self, name: str) -> None:
        """Refuse an operator's certificate from now on. The name may be given a new one.

        Raises:
            BadInputError: there is no operator of this name, or the CA's key is not there.
        """
        kept = _certificate_of(self.tls, name)
        if not kept.exists():
            known = ", ".join(sorted(path.stem for path in kept.parent.glob("*.pem"))) or "nobody"
            raise BadInputError(f"operator {name}: has no certificate, must be one of: {known}")
        authority = Authority(self.tls)
        revoked = kept.parent / "revoked"
        revoked.mkdir(exist_ok=True, mode=0o700)
        authority.revoke([*revoked.glob("*.pem"), kept])
        kept.rename(revoked / f"{name}-{len(list(revoked.glob('*.pem'))) + 1}.pem")


def _hand_out(authority: Authority, config: ServerConfig, name: str, folder: Path, *, days: int) -> None:
    """Write what an operator needs, and keep their certificate beside the CA's."""
    authority.issue_operator(folder / "operator", name, days=days)
    (folder / "ca.pem").write_bytes(authority.certificate_path.read_bytes())
    (folder / OPERATOR_FILE).write_text(operator_text(config.hosts[0], config.port))
    kept = _certificate_of(authority.certificate_path.parent, name)
    kept.parent.mkdir(exist_ok=True, mode=0o700)
    kept.write_bytes((folder / "operator.pem").read_bytes())


def _certificate_of(tls: Path, operator: str) -> Path:
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}", operator):
        raise BadInputError(f"operator {operator!r}: must be letters, digits, '.', '_' and '-', at most 64")
    return tls / "operators" / f"{operator}.pem"
