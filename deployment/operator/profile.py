"""What an operator holds to reach a server: its address, its CA, and a client certificate."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from platformdirs.unix import Unix

from conclave.base.errors import BadInputError
from conclave.base.toml_file import read_toml
from conclave.clients.folder.server_address import check_address
from conclave.clients.folder.toml_line import toml_line

OPERATOR_FILE = "superlink.toml"


@dataclass(frozen=True)
class Operator:
    """address: host:port. The three files are PEM; the key is the operator's own."""

    address: str
    ca: Path
    certificate: Path
    key: Path


def operator_text(host: str, port: int) -> str:
    """Return ``superlink.toml``."""
    shown = f"[{host}]" if ":" in host else host
    return f"""# Where the server is. ca.pem, operator.pem and operator.key lie beside this file.
{toml_line("address", f"{shown}:{port}")}
"""


def find_operator(name: str) -> Operator:
    """Find a server by the folder that its operator holds, or by that folder's name in ``~/.config/conclave``.

    Raises:
        BadInputError: there is none.
    """
    home = Unix("conclave").user_config_path  # on every system, as the registry of claims
    for folder in (Path(name), home / name):
        if (folder / OPERATOR_FILE).is_file():
            return _read(folder)
    raise BadInputError(
        f"--superlink {name}: no {OPERATOR_FILE} there, must be an operator's folder, or its name in {home}"
    )


def _read(folder: Path) -> Operator:
    path = folder / OPERATOR_FILE
    address = read_toml(path, "an operator's configuration").get("address")
    if not isinstance(address, str):
        raise BadInputError(f"{path}: address is {address!r}, must be host:port")
    try:
        check_address(address)
    except ValueError as error:
        raise BadInputError(f"{path}: address is {address!r}, {error}") from error
    operator = Operator(address, folder / "ca.pem", folder / "operator.pem", folder / "operator.key")
    for file in (operator.ca, operator.certificate, operator.key):
        if not file.is_file():
            raise BadInputError(f"{file}: missing, must lie beside {OPERATOR_FILE}")
    return operator
