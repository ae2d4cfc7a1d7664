"""Before some rounds, nodes choose experts: what goes out with the question, and whose answers are taken."""

from __future__ import annotations

import logging
from collections.abc import Mapping

from flwr.app import Message
from flwr.serverapp import Grid
from torch import Tensor

from conclave.base.canonical import sha256
from conclave.protocol.codec import encode, encode_tensors
from conclave.protocol.messages import QUERY_CHOOSE, ChooseRequest, ProtocolError
from conclave.server.replies.validation import DroppedError
from conclave.server.rounds.terms import Books, Nodes, Terms

log = logging.getLogger("conclave.server")


def let_nodes_choose(
    grid: Grid, terms: Terms, books: Books, nodes: Nodes, model: Mapping[str, Tensor], number: int
) -> None:
    """Let nodes choose experts, where that is due before a round. Who does not answer keeps what it has.

    Args:
        model: wire name → float32, what nodes choose by.
    """
    choices = books.choices
    if choices is None or not choices.due(number):
        return
    tensors = encode_tensors({name: model[name] for name in terms.plan.choosing_shapes})
    sent = sha256(tensors["body"].data)
    messages = []
    for flower_id, node in nodes.items():
        request = ChooseRequest(
            run_id=terms.run_id,
            scenario=terms.scenario,
            round=number,
            plan=terms.plan,
            receipt=books.receipts.latest(node.fingerprint),
        )
        messages.append(Message(encode(request, tensors), flower_id, QUERY_CHOOSE))
    waiting = dict(nodes)
    replies = grid.send_and_receive(messages, timeout=terms.federation.reply_timeout_s)
    for reply in sorted(replies, key=lambda message: message.metadata.src_node_id):
        if reply.metadata.src_node_id not in waiting or not reply.has_content():
            continue
        node = waiting.pop(reply.metadata.src_node_id)
        try:
            choices.take(number, node, terms.run_id, sent, reply.content, books.receipts)
        except (DroppedError, ProtocolError) as error:
            log.warning("node %s did not choose: %s", node.fingerprint, error)
    books.receipts.save()
    choices.finish(number)
