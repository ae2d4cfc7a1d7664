"""What nodes and servers use of Flower's inside: its tasks. One version only, which :func:`check_flower` guards.

Flower starts a process for every message and runs, on a node too, whatever code the server sends. Here the SuperNode
and the SuperLink run with ``--isolation process``: they wait for somebody to take their tasks. :func:`serve` does that,
in a process that stays warm, and calls what is installed. The bundle that comes with a task is bytes that nobody opens:
no path of it is on ``sys.path``, nothing of it is written to disk.

In a deployment only the files next to this one use Flower's inside, :mod:`conclave.deployment.flower.grid`,
:mod:`conclave.deployment.operator.flower_control`, :mod:`conclave.deployment.flower.database`, and
:mod:`conclave.deployment.flower.supernode`.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from typing import Literal

import httpx
from flwr.app import Message, RecordDict
from flwr.clientapp import ClientApp
from flwr.common.constant import SubStatus
from flwr.common.serde import context_from_proto, message_from_proto, run_from_proto
from flwr.proto.message_pb2 import ObjectTree
from flwr.proto.node_pb2 import Node
from flwr.proto.runtime_pb2 import (
    AcquireTaskRequest,
    PullAppMessagesRequest,
    PullTaskInputRequest,
    PushTaskOutputRequest,
    SendTaskHeartbeatRequest,
)
from flwr.supercore.heartbeat import HeartbeatSender
from flwr.supercore.inflatable.inflatable_protobuf_utils import (
    make_confirm_message_received_fn_protobuf,
    make_pull_object_fn_protobuf,
)
from flwr.supercore.inflatable.inflatable_utils import (
    ObjectPullError,
    ObjectPushError,
    pull_and_inflate_object_from_tree,
)
from flwr.supercore.interceptors import (
    RuntimeTokenHttpInterceptor,
    RuntimeVersionHttpInterceptor,
    SuperExecAuthHttpInterceptor,
)
from flwr.supercore.protobuf.client import ProtobufClientInterceptor
from flwr.supercore.runtime import RuntimeHttpClient
from flwr.supercore.task_identity import TaskIdentity
from flwr.supernode.runtime.run_clientapp import push_message

from conclave.base.errors import BadInputError
from conclave.deployment.flower.supernode import PATIENCE_S
from conclave.protocol.codec import encode
from conclave.protocol.messages import ProtocolError, Refusal

TESTED = "1.41.0"
CLIENT_APP: Literal["flwr-clientapp"] = "flwr-clientapp"
SERVER_APP: Literal["flwr-serverapp"] = "flwr-serverapp"
BUNDLE = "conclave/conclave"

_TASK_POLL_S = 0.1
_RETRY_S = 2.0
_MISSED_UNTIL_A_WARNING = 8

log = logging.getLogger("conclave.flower")


def check_flower() -> None:
    """Refuse any Flower but the version that these files were written for.

    Raises:
        BadInputError: another is installed.
    """
    found = version("flwr")
    if found != TESTED:
        raise BadInputError(
            f"flwr {found} is installed, must be {TESTED} to deploy: pip install -c constraints.txt flwr"
        )


def installed_version() -> str:
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
    """Take one task after the other and do it, until stopped. A failed task is logged; its sender is told nothing.

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
    with api.client(RuntimeTokenHttpInterceptor(token), component=CLIENT_APP) as client, beating(client):
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
        except ProtocolError as error:
            log.warning("refused with %s: %s", error.code, error)
            reply = Message(encode(Refusal(code=error.code)), reply_to=message)
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


def _whole(client: RuntimeHttpClient, node: Node, run_id: int, tree: ObjectTree) -> Message:
    """Fetch the parts of a message and put it together.

    Raises:
        ObjectPullError: a part did not come; the SuperNode gives up before, and takes the message back.
        ProtocolError: ``bad-request``, it is no message.
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
        raise ProtocolError("bad-request", f"what came is no message ({type(error).__name__})") from error
    message.metadata.__dict__["_message_id"] = tree.object_id
    return message


@contextmanager
def beating(client: RuntimeHttpClient) -> Iterator[None]:
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

    Flower's own raises SIGINT if the task is over, because there it has its own process; here that would end a
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
