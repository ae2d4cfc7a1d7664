"""What a run at the server uses of Flower's inside: messages to nodes and their replies, and the run's own task."""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import httpx
from flwr.app import Context, Error, Message, Metadata
from flwr.app.message import make_message
from flwr.common.constant import SUPERLINK_NODE_ID, ErrorCode, SubStatus
from flwr.common.serde import context_from_proto, message_from_proto, run_from_proto
from flwr.proto.log_pb2 import PushLogsRequest
from flwr.proto.message_pb2 import ObjectTree
from flwr.proto.runtime_pb2 import PullAppMessagesRequest, PullTaskInputRequest, PushTaskOutputRequest
from flwr.serverapp import Grid
from flwr.supercore.constant import SYSTEM_MESSAGE_TYPE
from flwr.supercore.inflatable.inflatable_object import iterate_object_tree
from flwr.supercore.inflatable.inflatable_protobuf_utils import (
    make_confirm_message_received_fn_protobuf,
    make_pull_object_fn_protobuf,
)
from flwr.supercore.inflatable.inflatable_utils import ObjectPullError, inflate_object_from_contents, pull_objects
from flwr.supercore.retry import RetryInvoker, exponential
from flwr.supercore.task_identity import TaskIdentity
from flwr.superlink.grid import HttpGrid

from conclave.base.errors import BadInputError, RunFailedError
from conclave.deployment.flower.runtime import BUNDLE, RuntimeApi, beating, installed_version
from conclave.deployment.flower.supernode import PATIENCE_S

_REPLY_POLL_S = 0.2
_RETRY_FOR_S = 60.0
_WHOSE = ("run_id", "src_node_id", "dst_node_id", "reply_to_message_id", "message_type")

log = logging.getLogger("conclave.flower")


@dataclass(frozen=True)
class _Announced:
    """A reply that the SuperLink knows of. parts: object id → content, so far. until: when it must be whole."""

    metadata: Metadata
    tree: ObjectTree
    parts: dict[str, bytes]
    until: float


class QuickGrid(HttpGrid):
    """Flower's grid, but no node can hold up the others or end a run.

    It looks for replies every 0.2 s, where Flower's own waits 3 s, and takes each once it is whole. Flower's own waits
    for hours for the rest of the first one announced. What is not a message, or claims to be somebody else's, is
    dropped, where Flower's own raises or believes it. And where the run is over it raises httpx.HTTPStatusError (401),
    where Flower's own sends its process SIGINT.
    """

    def __init__(self, api: RuntimeApi, token: str) -> None:
        super().__init__(api.address, insecure=api.ca is None, root_certificates=api.ca, token=token)
        self._announced: dict[str, _Announced] = {}  # by the id of what is answered
        self._retry_invoker = RetryInvoker(exponential, httpx.TransportError, max_tries=None, max_time=_RETRY_FOR_S)

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

        If a node is gone, Flower itself answers and the node is not waited for: nothing came from it.
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
    """Return what Flower gives for a lost reply, which nobody takes for a node's reply."""
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
    status, details = SubStatus.FAILED, f"{RunFailedError.BEGINNING}; the server's log says why"
    with beating(client):
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
                _check_version(run.fab_id, run.fab_version)
                work(grid, context, say)
                status, details = SubStatus.COMPLETED, ""
            except (BadInputError, RunFailedError) as error:
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


def _check_version(name: str, version: str) -> None:
    """Nodes compare the operator's release with theirs, so the server's must be that one too."""
    if (name, version) != (BUNDLE, installed_version()):
        raise BadInputError(
            f"the run was started with {name} {version}, must be {BUNDLE} {installed_version()}, as the server is"
        )
