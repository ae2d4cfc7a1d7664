"""A running node: Flower's SuperNode for the messages, and this process, which holds the data and answers them."""

from __future__ import annotations

import logging
import secrets
import sys
from pathlib import Path

from flwr.app import RecordDict

from clients import app, deployed
from clients.node import Node
from clients.protocol import Refusal, encode
from deployment.flower_runtime import BUNDLE, CLIENT_APP, RuntimeApi, answer_message, check_flower, release, serve
from deployment.certificates import write_secret
from clients.node_config import ConnectionConfig
from deployment.supervision import Family, Program

log = logging.getLogger("conclave.node")


def start_node(node: Node, connection: ConnectionConfig, state: Path) -> None:
    """Answer messages until SIGTERM or SIGINT.

    Args:
        state: the node's folder for what it keeps; Flower's files go there too.

    Raises:
        BadInputError: another Flower is installed.
    """
    check_flower()
    secret = state / "executor.secret"
    secret.unlink(missing_ok=True)
    write_secret(secret, secrets.token_bytes(32))
    deployed.deploy(node)
    with Family([_supernode(connection, state, secret)]) as family:
        log.info("node %s: connecting to %s", node.describe().fingerprint, connection.address)
        api = RuntimeApi(f"127.0.0.1:{connection.internal_port}", secret.read_bytes())
        serve(api, CLIENT_APP, lambda api, token: answer_message(app.app, api, token, _refusal), family.stopped)


def _supernode(connection: ConnectionConfig, state: Path, secret: Path) -> Program:
    return Program(
        "supernode",
        [
            str(Path(sys.executable).parent / "flower-supernode"),
            "--root-certificates", str(connection.ca), "--superlink", connection.address,
            "--auth-supernode-private-key", str(connection.key), "--isolation", "process",
            "--host", "127.0.0.1", "--port", str(connection.internal_port), "--superexec-auth-secret-file", str(secret),
        ],
        state / "supernode.log",
        {"FLWR_HOME": str(state / "flower")},
    )  # fmt: skip


def _refusal(name: str, version: str) -> RecordDict | None:
    """Answer a bundle that is not of this release: what it asks may mean something else here."""
    if (name, version) == (BUNDLE, release()):
        return None
    log.warning("refused with version-mismatch: the server's bundle is %s %s, here is %s", name, version, release())
    return encode(Refusal(code="version-mismatch"))
