"""The inline engine: a Flower Grid that calls the very same ClientApp in this process.

Flower's Message is built for its own transport; the two private touches it takes live here and nowhere else:
``TaskIdentity`` must be set before a message can be made, and a message's id has no setter.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

from flwr.app import Context, Message, RecordDict
from flwr.clientapp import ClientApp
from flwr.common.constant import SUPERLINK_NODE_ID
from flwr.serverapp import Grid, ServerApp
from flwr.supercore.run import Run
from flwr.supercore.task_identity import TaskIdentity

from conclave.simulations.engines.worker_pool import WorkerPool

RunConfig = dict[str, str]
_FIRST_NODE_ID = SUPERLINK_NODE_ID + 1


class InlineGrid(Grid):
    """Delivers each message to a ClientApp call and keeps the replies until they are pulled."""

    def __init__(
        self,
        client_app: ClientApp,
        nodes: int,
        run_id: int,
        run_config: RunConfig,
        on_reply: Callable[[Message], None],
        pool: WorkerPool | None = None,
    ) -> None:
        """Set up ``nodes`` nodes; node i is told ``partition-id`` i, as Flower's own simulation does.

        Args:
            on_reply: called after every reply, for progress.
            pool: processes that run ``client_app`` instead of this one.
        """
        self._client_app = client_app
        self._on_reply = on_reply
        self._pool = pool
        self._run = Run.create_empty(run_id)
        self._contexts = {
            _FIRST_NODE_ID + number: Context(
                run_id=run_id,
                node_id=_FIRST_NODE_ID + number,
                node_config={"partition-id": number, "num-partitions": nodes},
                state=RecordDict(),
                run_config=dict(run_config),
            )
            for number in range(nodes)
        }
        self._replies: dict[str, Message] = {}
        self._sent = 0
        TaskIdentity.run_id, TaskIdentity.node_id, TaskIdentity.task_id = run_id, SUPERLINK_NODE_ID, 0

    def set_run(self, run: Run) -> None:
        """Set the run."""
        self._run = run

    @property
    def run(self) -> Run:
        """The run."""
        return self._run

    def create_message(
        self,
        content: RecordDict,
        message_type: str,
        dst_node_id: int,
        group_id: str,
        ttl: float | None = None,
    ) -> Message:
        """Create a message to a node."""
        return Message(content, dst_node_id, message_type, ttl=ttl, group_id=group_id)

    def get_node_ids(self) -> list[int]:
        """Return the ids of all nodes."""
        return list(self._contexts)

    def push_messages(self, messages: Iterable[Message]) -> list[str]:
        """Deliver messages; each is answered before the next is taken. Returns their ids."""
        sent = list(messages)
        for reply in self.send_and_receive(sent):
            self._replies[reply.metadata.reply_to_message_id] = reply
        return [message.metadata.message_id for message in sent]

    def pull_messages(self, message_ids: Iterable[str]) -> list[Message]:
        """Return and forget the replies to the given messages."""
        return [self._replies.pop(key) for key in list(message_ids) if key in self._replies]

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> Iterator[Message]:
        """Yield the replies one by one; a node works when its reply is asked for, so no reply is kept.

        ``timeout`` cannot pass, since delivery is a call.
        """
        named = map(self._named, messages)
        if self._pool is None:
            replies: Iterator[Message] = (self._client_app(m, self._contexts[m.metadata.dst_node_id]) for m in named)
        else:
            replies = self._pool.run((m.metadata.dst_node_id - _FIRST_NODE_ID, m) for m in named)
        for reply in replies:
            reply.metadata.__dict__["_message_id"] = f"{reply.metadata.reply_to_message_id}-reply"
            self._on_reply(reply)
            yield reply

    def _named(self, message: Message) -> Message:
        self._sent += 1
        message.metadata.__dict__["_message_id"] = f"inline-{self._sent}"
        return message


def run_inline(
    server_app: ServerApp,
    client_app: ClientApp,
    *,
    nodes: int,
    run_id: int,
    run_config: RunConfig,
    on_reply: Callable[[Message], None],
    pool: WorkerPool | None = None,
) -> None:
    """Run a whole federation in this process, or its nodes in the processes of ``pool``."""
    grid = InlineGrid(client_app, nodes, run_id, run_config, on_reply, pool)
    context = Context(
        run_id=run_id, node_id=SUPERLINK_NODE_ID, node_config={}, state=RecordDict(), run_config=dict(run_config)
    )
    server_app(grid, context)
