"""A running node: Flower's SuperNode for the messages, and this process, which holds the data and answers them."""

from __future__ import annotations

import logging
import secrets
import sys
from pathlib import Path

from flwr.app import RecordDict

from conclave.base.errors import BadInputError, UnavailableError
from conclave.clients.app import make_client_app
from conclave.clients.folder.node_config import ConnectionConfig
from conclave.clients.folder.node_directory import NodeDirectory
from conclave.clients.folder.node_key import check_node_key
from conclave.deployment.flower.runtime import (
    BUNDLE,
    CLIENT_APP,
    RuntimeApi,
    answer_message,
    check_flower,
    installed_version,
    serve,
)
from conclave.deployment.host.alone import alone, check_ports
from conclave.deployment.host.certificates import write_secret
from conclave.deployment.host.environment import keep_caches_in, private_umask
from conclave.deployment.host.monitoring import HOST, monitoring
from conclave.deployment.host.outward_proxy import check_outward_proxy
from conclave.deployment.host.supervision import Family, Program
from conclave.deployment.node.check import look_at_server
from conclave.deployment.node.limits import keep_to
from conclave.deployment.node.loading import open_node
from conclave.deployment.node.metrics import NodeMetrics
from conclave.protocol.codec import encode
from conclave.protocol.messages import Refusal

log = logging.getLogger("conclave.node")


def start_node(directory: NodeDirectory) -> None:
    """Answer messages until SIGTERM or SIGINT.

    Raises:
        BadInputError: the node cannot be opened, is not connected to a server, a proxy or a limit cannot be used, or
            another Flower is installed.
        UnavailableError: it is running already.
    """
    check_flower()
    server = directory.config.server
    key, ca = directory.connection_files()
    if server is None:
        raise ValueError("a node without a server has no files for it")
    private_umask()
    check_outward_proxy()
    keep_caches_in(directory.state)
    keep_to(directory.config.limits)
    check_node_key(key)
    with alone(directory.state):
        _serve(directory, server, key, ca)


def _serve(directory: NodeDirectory, server: ConnectionConfig, key: Path, ca: Path) -> None:
    node = open_node(directory)
    check_ports(
        {
            "server.internal_port": (HOST, server.internal_port),
            "monitoring.metrics_port": (HOST, directory.config.monitoring.metrics_port),
        }
    )
    try:
        look_at_server(directory)
    except (BadInputError, UnavailableError) as error:  # it may come back; the SuperNode goes on trying
        log.warning("%s", error)
    secret = directory.state / "executor.secret"
    secret.unlink(missing_ok=True)
    write_secret(secret, secrets.token_bytes(32))
    supernode = Program(
        "supernode",
        [
            sys.executable, "-P", "-m", "conclave.deployment.flower.supernode",
            "--root-certificates", str(ca), "--superlink", server.address, "--auth-supernode-private-key", str(key),
            "--isolation", "process", "--host", "127.0.0.1", "--port", str(server.internal_port),
            "--superexec-auth-secret-file", str(secret),
        ],
        directory.state / "supernode.log",
        {"FLWR_HOME": str(directory.state / "flower")},
        f"; conclave node check {directory.path} finds most reasons; or is its key not enrolled, or in use elsewhere?",
    )  # fmt: skip
    reached = {"supernode-answers": False}
    app = make_client_app(lambda _: node)  # whatever a message says, it is this node that answers
    with Family([supernode]) as family:
        metrics = NodeMetrics(node, family.running, ca, directory.state)
        with monitoring(directory.config.monitoring.metrics_port, metrics, lambda: family.running() | reached):
            log.info("node %s: dials %s", node.describe().fingerprint, server.address)
            api = RuntimeApi(f"127.0.0.1:{server.internal_port}", secret.read_bytes())
            serve(
                api,
                CLIENT_APP,
                lambda api, token: answer_message(app, api, token, _refusal, metrics.count),
                family.stopped,
                lambda found: reached.update({"supernode-answers": found}),
            )


def _refusal(name: str, version: str) -> RecordDict | None:
    """Answer a bundle of another release: what it asks may mean something else here."""
    if (name, version) == (BUNDLE, installed_version()):
        return None
    log.warning(
        "refused with version-mismatch: the server's bundle is %s %s, here is %s", name, version, installed_version()
    )
    return encode(Refusal(code="version-mismatch"))
