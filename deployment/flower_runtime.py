"""What a deployment uses of Flower's inside: handing tasks out, and the control API. One version only.

Flower starts a process for every message and runs, on a node too, whatever code the server sends. Here the SuperNode
and the SuperLink run with ``--isolation process``: they wait for somebody to take their tasks. :func:`serve` does that,
in a process that stays warm, and calls what is installed. The bundle that comes with a task is bytes that nobody opens:
no path of it is on ``sys.path``, nothing of it is written to disk.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import ssl
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from types import MappingProxyType
from typing import Literal

import httpx
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec
from flwr.app import Context, Error, Message, Metadata, RecordDict
from flwr.app.message import make_message
from flwr.cli.build import build_fab_from_files
from flwr.clientapp import ClientApp
from flwr.common.constant import SUPERLINK_NODE_ID, ErrorCode, SubStatus
from flwr.common.serde import (
    context_from_proto,
    fab_to_proto,
    message_from_proto,
    run_from_proto,
    user_config_to_proto,
)
from flwr.proto.control_pb2 import (
    ListNodesRequest,
    ListRunsRequest,
    RegisterNodeRequest,
    StartRunRequest,
    StopRunRequest,
    StreamLogsRequest,
    UnregisterNodeRequest,
)
from flwr.proto.log_pb2 import PushLogsRequest
from flwr.proto.message_pb2 import ObjectTree
from flwr.proto.node_pb2 import Node
from flwr.proto.runtime_pb2 import (
    AcquireTaskRequest,
    PullAppMessagesRequest,
    PullTaskInputRequest,
    PushTaskOutputRequest,
    SendTaskHeartbeatRequest,
)
from flwr.serverapp import Grid
from flwr.supercore.constant import SYSTEM_MESSAGE_TYPE
from flwr.supercore.control.control_http_client import ControlHttpClient
from flwr.supercore.fab import Fab
from flwr.supercore.heartbeat import HeartbeatSender
from flwr.supercore.inflatable.inflatable_object import iterate_object_tree
from flwr.supercore.inflatable.inflatable_protobuf_utils import (
    make_confirm_message_received_fn_protobuf,
    make_pull_object_fn_protobuf,
)
from flwr.supercore.inflatable.inflatable_utils import (
    ObjectPullError,
    ObjectPushError,
    inflate_object_from_contents,
    pull_and_inflate_object_from_tree,
    pull_objects,
)
from flwr.supercore.interceptors import (
    RuntimeTokenHttpInterceptor,
    RuntimeVersionHttpInterceptor,
    SuperExecAuthHttpInterceptor,
)
from flwr.supercore.primitives.asymmetric import public_key_to_bytes
from flwr.supercore.protobuf.client import ProtobufClientInterceptor
from flwr.supercore.retry import RetryInvoker, exponential
from flwr.supercore.runtime import RuntimeHttpClient
from flwr.supercore.task_identity import TaskIdentity
from flwr.superlink.grid import HttpGrid
from flwr.supernode.runtime.run_clientapp import push_message

from clients.protocol import Refusal, encode
from deployment.certificates import days_left
from deployment.operator import Operator
from deployment.outward_proxy import check_outward_proxy
from deployment.supernode import PATIENCE_S
from model.errors import BadInputError

TESTED = "1.41.0"
CLIENT_APP: Literal["flwr-clientapp"] = "flwr-clientapp"
SERVER_APP: Literal["flwr-serverapp"] = "flwr-serverapp"
BUNDLE = "conclave/conclave"

_TASK_POLL_S = 0.1
_REPLY_POLL_S = 0.2
_RETRY_S = 2.0
_MISSED_UNTIL_A_WARNING = 8
_PATIENCE_S = 60.0
_WHOSE = ("run_id", "src_node_id", "dst_node_id", "reply_to_message_id", "message_type")

log = logging.getLogger("conclave.flower")


def check_flower() -> None:
    """Refuse a Flower other than the one that this file was written for.

    Raises:
        BadInputError: another is installed.
    """
    found = version("flwr")
    if found != TESTED:
        raise BadInputError(
            f"flwr {found} is installed, must be {TESTED} to deploy: pip install -c constraints.txt flwr"
        )


def release() -> str:
    """Return the installed version of Conclave, which a server and its nodes must share."""
    return version("conclave-moe")


@dataclass(frozen=True)
class RuntimeApi:
    """Where tasks are handed out, on loopback. secret: whoever takes one must know it. ca: None without TLS."""

    address: str
    secret: bytes
    ca: bytes | None = None

    @contextmanager
    def client(self, *interceptors: ProtobufClientInterceptor, component: str) -> Iterator[RuntimeHttpClient]:
        """Connect."""
        client = RuntimeHttpClient.from_server_address(
            self.address,
            insecure=self.ca is None,
            root_certificates=self.ca,
            interceptors=[RuntimeVersionHttpInterceptor(component_name=component), *interceptors],
        )
        try:
            yield client
        finally:
            client.close()


def serve(
    api: RuntimeApi,
    kind: str,
    work: Callable[[RuntimeApi, str], None],
    stopped: threading.Event,
    reached: Callable[[bool], None] = lambda _: None,
) -> None:
    """Take one task after the other and do it, until stopped. A task that fails is logged; its sender is told nothing.

    Args:
        kind: :data:`CLIENT_APP` or :data:`SERVER_APP`.
        work: gets the token of a task.
        reached: told at each look whether tasks are handed out at all.
    """
    signed = SuperExecAuthHttpInterceptor(
        master_secret=api.secret, protected_methods=["/flwr.proto.Runtime/AcquireTask"]
    )
    missed = 0
    with api.client(signed, component="SuperExec") as client:
        while not stopped.is_set():
            try:
                found = client.AcquireTask(AcquireTaskRequest(supported_task_types=[kind]))
                missed = 0
                reached(True)
            except httpx.HTTPError as error:
                missed += 1
                if missed == _MISSED_UNTIL_A_WARNING:  # at first it is starting
                    log.warning("no tasks from %s: %s; trying again", api.address, type(error).__name__)
                reached(False)
                stopped.wait(_RETRY_S)
                continue
            if not (found.HasField("task") and found.token):
                stopped.wait(_TASK_POLL_S)
                continue
            try:
                work(api, found.token)
            except Exception:
                log.exception("a task failed")


def answer_message(
    app: ClientApp,
    api: RuntimeApi,
    token: str,
    refuse: Callable[[str, str], RecordDict | None],
    count: Callable[[Message, Message], None],
) -> None:
    """Answer the message of one task with an installed ClientApp.

    Args:
        refuse: (name, version) of the bundle → the content of a refusal, or None.
        count: told each message with its answer, a refusal or not.
    """
    with api.client(RuntimeTokenHttpInterceptor(token), component=CLIENT_APP) as client, _beating(client):
        given = client.PullTaskInput(PullTaskInputRequest())
        context, run = context_from_proto(given.context), run_from_proto(given.run)
        TaskIdentity.task_id, TaskIdentity.run_id, TaskIdentity.node_id = given.task_id, run.run_id, context.node_id
        found = client.PullMessages(PullAppMessagesRequest())
        (announced,), (tree,) = found.messages_list, found.message_object_trees
        message = message_from_proto(announced)  # what it says of itself; its content comes in parts
        # The SuperNode waits for a reply before it takes another message: it gets one, whatever happens here.
        try:
            message = _whole(client, Node(node_id=context.node_id), run.run_id, tree)
            refusal = refuse(run.fab_id, run.fab_version)
            reply = app(message, context) if refusal is None else Message(refusal, reply_to=message)
        except (ObjectPullError, httpx.HTTPError) as error:  # but for one that the SuperNode takes back itself
            log.warning("a message did not come whole (%s); was its run stopped?", type(error).__name__)
            return
        except _UnreadableError as error:
            log.warning("refused with bad-request: what came is no message (%s)", error)
            reply = Message(encode(Refusal(code="bad-request")), reply_to=message)
        except Exception:
            log.exception("the app failed; the server is told internal-error and nothing else")
            reply = Message(encode(Refusal(code="internal-error")), reply_to=message)
        count(message, reply)
        try:
            push_message(client, reply, context)
        except (ObjectPushError, httpx.HTTPError) as error:  # what was paid for is kept, and sent when it is asked for
            log.warning("a reply was not taken (%s); was the run stopped?", type(error).__name__)
            return
        client.PushTaskOutput(PushTaskOutputRequest(sub_status=SubStatus.COMPLETED, details=""))


class _UnreadableError(Exception):
    """What came is no message."""


def _whole(client: RuntimeHttpClient, node: Node, run_id: int, tree: ObjectTree) -> Message:
    """Fetch the parts of a message and put it together.

    Raises:
        ObjectPullError: a part did not come; the SuperNode gives up before, and takes the message back.
        _UnreadableError: it is no message.
    """
    try:
        message = pull_and_inflate_object_from_tree(
            tree,
            make_pull_object_fn_protobuf(client.PullObject, node, run_id),
            make_confirm_message_received_fn_protobuf(client.ConfirmMessageReceived, node, run_id),
            return_type=Message,
            max_time=1.5 * PATIENCE_S,
        )
    except (ObjectPullError, httpx.HTTPError):
        raise
    except Exception as error:  # of whatever kind: somebody else made the bytes
        raise _UnreadableError(type(error).__name__) from error
    message.metadata.__dict__["_message_id"] = tree.object_id
    return message


@dataclass(frozen=True)
class _Announced:
    """A reply that the SuperLink knows of. parts: object id → content, so far. until: when it must be whole."""

    metadata: Metadata
    tree: ObjectTree
    parts: dict[str, bytes]
    until: float


class QuickGrid(HttpGrid):
    """Flower's grid, but no node can hold up the others or end a run.

    It looks for replies every 0.2 s where Flower's own waits 3 s, and takes each when it is whole: Flower's own waits
    for hours for the rest of the first that was announced. What is no message, or says that it is somebody else's, is
    dropped, where Flower's own raises or believes it. And where the run is over it raises httpx.HTTPStatusError (401),
    where Flower's own sends its process SIGINT.
    """

    def __init__(self, api: RuntimeApi, token: str) -> None:
        super().__init__(api.address, insecure=api.ca is None, root_certificates=api.ca, token=token)
        self._announced: dict[str, _Announced] = {}  # by the id of what is answered
        self._retry_invoker = RetryInvoker(exponential, httpx.TransportError, max_tries=None, max_time=_PATIENCE_S)

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        """Return the replies to these messages that are whole. One that will not be comes as an error from nobody."""
        asked, now = list(message_ids), time.monotonic()
        unknown = [key for key in asked if key not in self._announced]  # of others the SuperLink knows nothing any more
        found = self._runtime_client.PullMessages(PullAppMessagesRequest(message_ids=unknown))
        for proto, tree in zip(found.messages_list, found.message_object_trees, strict=True):
            metadata = message_from_proto(proto).metadata
            self._announced[metadata.reply_to_message_id] = _Announced(metadata, tree, {}, now + PATIENCE_S)
        replies = []
        for key in [key for key in asked if key in self._announced]:
            announced = self._announced[key]
            try:
                reply = self._fetch(announced)
            except ObjectPullError:
                if now < announced.until:
                    continue
                reply = _from_nobody(announced.metadata, "it did not come whole")
            except httpx.HTTPError:
                raise
            except Exception as error:  # of whatever kind: a node made the bytes
                reply = _from_nobody(announced.metadata, f"it is no message ({type(error).__name__})")
            replies.append(reply)
            del self._announced[key]
        self._announced = {key: entry for key, entry in self._announced.items() if now < entry.until}
        return replies

    def _fetch(self, announced: _Announced) -> Message:
        """Fetch what is missing of a reply, without waiting for it."""
        client, run_id = self._runtime_client, announced.metadata.run_id
        pull, parts = make_pull_object_fn_protobuf(client.PullObject, self.node, run_id), announced.parts

        def pull_missing(object_id: str) -> bytes:
            if object_id not in parts:
                parts[object_id] = pull(object_id)
            return parts[object_id]

        head = announced.tree.object_id
        ids = [node.object_id for node in iterate_object_tree(announced.tree)]
        contents = pull_objects(ids, pull_missing, max_tries_per_object=1)
        make_confirm_message_received_fn_protobuf(client.ConfirmMessageReceived, self.node, run_id)(head)
        message = inflate_object_from_contents(head, contents)
        if not isinstance(message, Message):
            raise TypeError("another object")
        # The SuperLink has checked who announced it, and for which request; the message itself may say otherwise.
        said, known = message.metadata, announced.metadata
        if any(getattr(said, name) != getattr(known, name) for name in _WHOSE):
            raise ValueError("of another node or request")
        said.__dict__["_message_id"] = head
        return message

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> Iterable[Message]:
        """Send messages and wait for the replies, or until the time is over.

        Where a node is gone, Flower answers itself, and is not waited for: nothing came from the node.
        """
        waiting = {found for found in self.push_messages(list(messages)) if found}
        deadline = None if timeout is None else time.monotonic() + timeout
        replies: list[Message] = []
        while waiting and (deadline is None or time.monotonic() < deadline):
            found = list(self.pull_messages(waiting))
            replies += [message for message in found if message.metadata.src_node_id != SUPERLINK_NODE_ID]
            waiting -= {message.metadata.reply_to_message_id for message in found}
            if waiting:
                time.sleep(_REPLY_POLL_S)
        return replies


def _from_nobody(metadata: Metadata, flaw: str) -> Message:
    """Return what Flower gives for a reply that is lost, which nobody takes for a node's."""
    log.warning("node %d: its reply is dropped, %s", metadata.src_node_id, flaw)
    return make_message(
        metadata=Metadata(
            run_id=metadata.run_id,
            message_id="",
            src_node_id=SUPERLINK_NODE_ID,
            dst_node_id=SUPERLINK_NODE_ID,
            message_type=SYSTEM_MESSAGE_TYPE,
            group_id="",
            ttl=0,
            reply_to_message_id=metadata.reply_to_message_id,
            created_at=time.time(),
        ),
        error=Error(code=ErrorCode.MESSAGE_UNAVAILABLE, reason=flaw),
    )


def run_on_server(work: Callable[[Grid, Context, Callable[[str], None]], None], api: RuntimeApi, token: str) -> None:
    """Do the work of one run; what is said through its last argument is what ``conclave train`` shows.

    ``context.run_config`` is what the operator asked for.
    """
    grid = QuickGrid(api, token)
    client = grid._runtime_client
    status, details = SubStatus.FAILED, "the run failed; the server's log says why"
    with _beating(client):
        try:
            given = client.PullTaskInput(PullTaskInputRequest())
            TaskIdentity.task_id, TaskIdentity.run_id = given.task_id, given.run.run_id
            TaskIdentity.node_id = given.context.node_id
            context, run = context_from_proto(given.context), run_from_proto(given.run)
            context.run_config = run.override_config
            grid.set_run(run)

            def say(line: str) -> None:
                client.PushLogs(PushLogsRequest(run_id=run.run_id, logs=[f"{line}\n"]))

            try:
                _check_release(run.fab_id, run.fab_version)
                work(grid, context, say)
                status, details = SubStatus.COMPLETED, ""
            except BadInputError as error:
                details = str(error)
            except httpx.HTTPStatusError as error:
                if error.response.status_code != httpx.codes.UNAUTHORIZED:
                    raise
                log.warning("run %d was stopped", run.run_id)
        finally:
            grid._retry_invoker.max_tries = 1  # whoever is stopping does not wait for a server that is gone
            with contextlib.suppress(httpx.HTTPError):
                client.PushTaskOutput(PushTaskOutputRequest(sub_status=status, details=details))
            grid.close()


def _check_release(name: str, version: str) -> None:
    """Nodes compare the operator's release with theirs, so the server's must be that one too."""
    if (name, version) != (BUNDLE, release()):
        raise BadInputError(
            f"the run was started with {name} {version}, must be {BUNDLE} {release()}, as the server is"
        )


@contextmanager
def _beating(client: RuntimeHttpClient) -> Iterator[None]:
    """Say at intervals that the task is being worked on."""
    sender = HeartbeatSender(heartbeat_of(client))
    sender.start()
    try:
        yield
    finally:
        if sender.is_running:
            sender.stop()


def heartbeat_of(client: RuntimeHttpClient) -> Callable[[], bool]:
    """Return what sends one heartbeat, and whether it arrived.

    Flower's own raises SIGINT where the task is over, for there it has a process to itself; here that would end a
    server or a node. Whoever works on the task finds out by its next request.
    """

    def beat() -> bool:
        try:
            client.SendTaskHeartbeat(SendTaskHeartbeatRequest())
        except httpx.TransportError:
            return False
        except httpx.HTTPStatusError:
            return True
        return True

    return beat


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


class Control:
    """The control API, for operators."""

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
            BadInputError: that is no such key, or the server refuses or cannot be reached.
        """
        try:
            key = serialization.load_ssh_public_key(public_key.read_bytes())
        except (OSError, ValueError, UnsupportedAlgorithm) as error:
            raise BadInputError(f"{public_key}: cannot be read, must be a node's public key (.pub)") from error
        if not isinstance(key, ec.EllipticCurvePublicKey):
            raise BadInputError(f"{public_key}: another kind of key, must be an elliptic curve's")
        request = RegisterNodeRequest(public_key=public_key_to_bytes(key))
        with self._asking("register the node", {412: "its key is enrolled already"}):
            return int(self._client.RegisterNode(request).node_id)

    def unregister(self, node_id: int) -> None:
        """Let a node connect no more.

        Raises:
            BadInputError: there is no such node, or the server refuses or cannot be reached.
        """
        with self._asking(f"remove node {node_id}", {404: "no such node is enrolled; conclave status lists them"}):
            self._client.UnregisterNode(UnregisterNodeRequest(node_id=node_id))

    def start(self, run_config: Mapping[str, str]) -> int:
        """Start a run; return its number."""
        content = bundle(release())
        fab = Fab(hashlib.sha256(content).hexdigest(), content, {})
        request = StartRunRequest(fab=fab_to_proto(fab), override_config=user_config_to_proto(dict(run_config)))
        with self._asking("start the run"):
            response = self._client.StartRun(request)
            if not response.HasField("run_id"):
                raise BadInputError(f"{self._address}: did not start the run")
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
            why = known.get(code, f"HTTP {code}")
            raise BadInputError(f"{self._address}: cannot {what}: {why}") from error
        except httpx.HTTPError as error:
            raise BadInputError(f"{self._address}: cannot {what}: {_why(error)}") from error
        except (httpx.InvalidURL, UnicodeError) as error:
            raise BadInputError(f"{self._address}: cannot {what}: no such address can be") from error


def _why(error: httpx.HTTPError) -> str:
    """Say why nothing came back. The error of a connection has that of the certificate somewhere below it."""
    below: BaseException | None = error
    while below is not None:
        if isinstance(below, ssl.SSLCertVerificationError):
            return f"the server's certificate is not accepted ({below.verify_message})"
        below = below.__cause__ or below.__context__
    return f"not reachable ({type(error).__name__})"


def bundle(number: str) -> bytes:
    """Return what travels as Flower's app bundle: a name and a version, and no code at all."""
    project = f"""[build-system]
requires = ["hatchling"]
build-backend = "hatchling.build"
[project]
name = "conclave"
version = "{number}"
description = "Runs the installed Conclave."
license = "Apache-2.0"
dependencies = ["flwr=={TESTED}"]
[tool.flwr.app]
publisher = "conclave"
[tool.flwr.app.components]
serverapp = "server.app:app"
clientapp = "clients.app:app"
[tool.flwr.app.config]
scenario = ""
resume = ""
"""
    return build_fab_from_files({"pyproject.toml": project.encode()})[0]
