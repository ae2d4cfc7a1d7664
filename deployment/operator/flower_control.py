"""What operators use of Flower's inside: the control API, and the bundle that starts a run."""

from __future__ import annotations

import hashlib
import ssl
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

import httpx
import tomli_w
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec
from flwr.cli.build import build_fab_from_files
from flwr.common.constant import SubStatus
from flwr.common.serde import fab_to_proto, user_config_to_proto
from flwr.proto.control_pb2 import (
    ListNodesRequest,
    ListRunsRequest,
    RegisterNodeRequest,
    StartRunRequest,
    StopRunRequest,
    StreamLogsRequest,
    UnregisterNodeRequest,
)
from flwr.supercore.control.control_http_client import ControlHttpClient
from flwr.supercore.fab import Fab
from flwr.supercore.primitives.asymmetric import public_key_to_bytes

from conclave.base.errors import BadInputError, RunFailedError, UnavailableError
from conclave.base.reading import read_text
from conclave.deployment.flower.runtime import TESTED, check_flower, installed_version
from conclave.deployment.host.certificates import days_left
from conclave.deployment.host.outward_proxy import check_outward_proxy
from conclave.deployment.operator.profile import Operator

_LOOK_S = 0.5
_NO_SENTENCES_OF_THE_SERVERS = ("", "No heartbeat received from the task")
"""What Flower says by itself of a run that it ended."""


@dataclass(frozen=True)
class ListedRun:
    """One run as the server lists it."""

    run_id: int
    status: str
    sub_status: str
    details: str

    @property
    def finished(self) -> bool:
        """Whether it is over, well or not."""
        return self.status == "finished"

    @property
    def refused(self) -> bool:
        """Whether the server refused what it was asked to run; ``details`` says why. A run may fail otherwise, too."""
        details = self.details
        ours = details not in _NO_SENTENCES_OF_THE_SERVERS and not details.startswith(RunFailedError.BEGINNING)
        return self.sub_status == SubStatus.FAILED and ours


class Control:
    """The control API, for operators.

    Whatever it is asked raises BadInputError where the server refuses, and UnavailableError where it does not answer.
    """

    def __init__(self, address: str, trusted: ssl.SSLContext) -> None:
        """Connect lazily.

        Args:
            trusted: who may have signed the server's certificate, and what is shown to it.
        """
        self._address = address
        self._client = ControlHttpClient(f"https://{address}", verify=trusted)

    @classmethod
    def of(cls, operator: Operator) -> Control:
        """Reach a server through its proxy, with the operator's certificate.

        Raises:
            BadInputError: a certificate or a proxy cannot be used, or another Flower is installed.
        """
        check_flower()
        check_outward_proxy()
        left = days_left(operator.certificate)
        if left < 0.0:
            raise BadInputError(f"{operator.certificate}: expired {-left:.0f} days ago, must be one that is valid now")
        try:
            context = ssl.create_default_context(cafile=operator.ca)
            context.load_cert_chain(operator.certificate, operator.key)
        except (OSError, ssl.SSLError) as error:
            raise BadInputError(f"{operator.certificate}: cannot be used with its key and {operator.ca}") from error
        return cls(operator.address, context)

    def __enter__(self) -> Control:
        """Connect when something is asked."""
        return self

    def __exit__(self, *_: object) -> None:
        """Disconnect."""
        self._client.close()

    def register(self, public_key: Path) -> int:
        """Enrol a node by its public key; return Flower's id for it.

        Raises:
            BadInputError: that is no such key.
        """
        try:
            text = read_text(public_key, "a node's public key (.pub)")
            key = serialization.load_ssh_public_key(text.strip().encode())
        except BadInputError:
            raise
        except (ValueError, UnsupportedAlgorithm) as error:
            raise BadInputError(f"{public_key}: cannot be read, must be a node's public key (.pub)") from error
        if not isinstance(key, ec.EllipticCurvePublicKey):
            raise BadInputError(f"{public_key}: another kind of key, must be an elliptic curve's")
        request = RegisterNodeRequest(public_key=public_key_to_bytes(key))
        with self._asking("register the node", {412: "its key is enrolled already"}):
            return int(self._client.RegisterNode(request).node_id)

    def unregister(self, node_id: int) -> None:
        """Stop a node from connecting."""
        with self._asking(f"remove node {node_id}", {404: "no such node is enrolled; conclave status lists them"}):
            self._client.UnregisterNode(UnregisterNodeRequest(node_id=node_id))

    def start(self, run_config: Mapping[str, str]) -> int:
        """Start a run; return its number."""
        content = bundle(installed_version())
        fab = Fab(hashlib.sha256(content).hexdigest(), content, {})
        request = StartRunRequest(fab=fab_to_proto(fab), override_config=user_config_to_proto(dict(run_config)))
        with self._asking("start the run"):
            response = self._client.StartRun(request)
            if not response.HasField("run_id"):
                raise UnavailableError(f"{self._address}: did not start the run")
            return int(response.run_id)

    def stop(self, run_id: int) -> bool:
        """Stop a run; return whether it was running."""
        over = {404: "no such run; conclave status lists them", 412: "it is over already"}
        with self._asking(f"stop run {run_id}", over):
            return bool(self._client.StopRun(StopRunRequest(run_id=run_id)).success)

    def runs(self, run_id: int | None = None) -> list[ListedRun]:
        """List one run, or the latest ones."""
        request = ListRunsRequest(run_id=run_id) if run_id is not None else ListRunsRequest(limit=50)
        with self._asking("list runs"):
            found = self._client.ListRuns(request).run_dict.items()
        return [
            ListedRun(number, run.status.status, run.status.sub_status, run.status.details)
            for number, run in sorted(found)
        ]

    def said(self, run_id: int) -> Iterator[str]:
        """Yield the lines that a run says, as they come, until it is over."""
        with self._asking("follow the run"):
            for found in self._client.StreamLogs(StreamLogsRequest(run_id=run_id)):
                yield from found.log_output.splitlines()

    def nodes(self) -> list[tuple[int, str]]:
        """List the enrolled nodes: id and status."""
        with self._asking("list nodes"):
            found = self._client.ListNodes(ListNodesRequest()).nodes_info
        return [(int(node.node_id), str(node.status)) for node in found]

    @contextmanager
    def _asking(self, what: str, reasons: Mapping[int, str] = MappingProxyType({})) -> Iterator[None]:
        try:
            yield
        except httpx.HTTPStatusError as error:
            code = error.response.status_code
            known = {403: "the operator's certificate was not accepted", **reasons}
            refusal = f"{self._address}: cannot {what}: {known.get(code, f'HTTP {code}')}"
            if code >= httpx.codes.INTERNAL_SERVER_ERROR:  # the proxy's, say, while the server starts
                raise UnavailableError(refusal) from error
            raise BadInputError(refusal) from error
        except httpx.HTTPError as error:
            certificate = _unaccepted(error)
            if certificate is not None:
                raise BadInputError(f"{self._address}: cannot {what}: {certificate}") from error
            raise UnavailableError(f"{self._address}: cannot {what}: not reachable ({type(error).__name__})") from error
        except (httpx.InvalidURL, UnicodeError) as error:
            raise BadInputError(f"{self._address}: cannot {what}: no such address can be") from error


def _unaccepted(error: httpx.HTTPError) -> str | None:
    """Say what is wrong with the server's certificate: an error of the connection has that somewhere below it."""
    below: BaseException | None = error
    while below is not None:
        if isinstance(below, ssl.SSLCertVerificationError):
            return f"the server's certificate is not accepted ({below.verify_message})"
        below = below.__cause__ or below.__context__
    return None


def bundle(number: str) -> bytes:
    """Return what travels as Flower's app bundle: a name and a version, and no code at all.

    The apps that it names do not exist: servers and nodes run what is installed, and load nothing by these names.
    """
    project = {
        "name": "conclave",
        "version": number,
        "description": "Runs the installed Conclave.",
        "license": "Apache-2.0",
        "dependencies": [f"flwr=={TESTED}"],
    }
    app = {
        "publisher": "conclave",
        "components": {"serverapp": "installed:server", "clientapp": "installed:node"},
        "config": {"scenario": "", "resume": ""},
    }
    build_system = {"requires": ["hatchling"], "build-backend": "hatchling.build"}
    document = {"build-system": build_system, "project": project, "tool": {"flwr": {"app": app}}}
    return build_fab_from_files({"pyproject.toml": tomli_w.dumps(document).encode()})[0]


def follow(control: Control, run_id: int, say: Callable[[str], None]) -> ListedRun:
    """Say what the run says, line by line, and return how it ended."""
    for line in control.said(run_id):
        say(line)
    while not (found := control.runs(run_id)[0]).finished:
        time.sleep(_LOOK_S)
    return found
