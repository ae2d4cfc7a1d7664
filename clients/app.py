"""The Flower ClientApp: decode, call a plain function, encode. Nothing else leaves from here."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import TypeVar

from flwr.app import Context, Message, RecordDict
from flwr.clientapp import ClientApp

from clients.deployed import deployed
from clients.node import Node
from clients.protocol import (
    AdmitRequest,
    ChooseRequest,
    CloseRequest,
    DescribeRequest,
    EvaluateRequest,
    ProtocolError,
    Refusal,
    TrainRequest,
    decode,
    encode,
)
from data.shipped_scenarios import scenario_text
from data.simulated_run import simulated_run_dir
from model.errors import BadInputError

log = logging.getLogger("conclave.node")

app = ClientApp()

_Request = TypeVar("_Request", ChooseRequest, TrainRequest, EvaluateRequest)


@app.query("describe")
def describe(message: Message, context: Context) -> Message:
    """Answer what is public about this node."""

    def run() -> RecordDict:
        request = decode(message.content, DescribeRequest) if message.content else DescribeRequest()
        return encode(open_node(context).describe(request.model))

    return _answer(message, run)


@app.query("admit")
def admit(message: Message, context: Context) -> Message:
    """Say whether a plan may run, and set its budget aside."""
    return _answer(message, lambda: encode(open_node(context).admit(decode(message.content, AdmitRequest))))


@app.query("close")
def close(message: Message, context: Context) -> Message:
    """Give back what is set aside for a run that is over."""
    return _answer(message, lambda: encode(open_node(context).close(decode(message.content, CloseRequest))))


@app.query("choose")
def choose(message: Message, context: Context) -> Message:
    """Choose experts, and reply with their order."""
    return _answer_release(message, context, ChooseRequest, Node.choose)


@app.train()
def train(message: Message, context: Context) -> Message:
    """Train one round and reply with the delta of exactly what was sent."""
    return _answer_release(message, context, TrainRequest, Node.train)


@app.evaluate()
def evaluate(message: Message, context: Context) -> Message:
    """Measure a model on held-out units and reply with the noised sums."""
    return _answer_release(message, context, EvaluateRequest, Node.evaluate)


def open_node(context: Context) -> Node:
    """Find the node that this process stands for: the deployed one, or a simulated one.

    ``partition-id`` is set by a simulation engine on its own side; a message cannot set it.

    Raises:
        ProtocolError: ``not-enrolled``, the node has not been set up.
    """
    node = deployed()
    if node is not None:  # and nothing that a message says leads to another
        return node
    from clients.simulated import open_simulated  # partitioners and their libraries: nothing for a deployed node

    number, of = (context.node_config.get(key) for key in ("partition-id", "num-partitions"))
    if not isinstance(number, int) or not isinstance(of, int):
        raise ProtocolError("not-enrolled", "this node has no data configured")
    return open_simulated(
        scenario_text(str(context.run_config["scenario"])),
        str(simulated_run_dir(str(context.run_config["run-dir"]), context.run_id)),
        number,
        of,
    )


def _answer_release(
    message: Message,
    context: Context,
    kind: type[_Request],
    handle: Callable[[Node, _Request, RecordDict], RecordDict],
) -> Message:
    """Answer a request for a release with what the node makes of it and of the tensors beside it."""

    def run() -> RecordDict:
        request = decode(message.content, kind)
        return handle(open_node(context), request, message.content)

    return _answer(message, run)


def _answer(message: Message, handle: Callable[[], RecordDict]) -> Message:
    """Run a handler; whatever goes wrong stays on the node, and the server gets a code.

    Flower sends the text of an escaping exception to the server verbatim, so none may escape.
    """
    try:
        content = handle()
    except ProtocolError as error:
        level = logging.ERROR if error.code == "internal-error" else logging.INFO  # of a simulation only errors show
        log.log(level, "refused with %s: %s", error.code, error)
        content = encode(Refusal(code=error.code))
    except BadInputError as error:  # of the owner: one sentence says it all
        log.error("the server is told internal-error and nothing else: %s", error)
        content = encode(Refusal(code="internal-error"))
    except Exception:
        log.exception("a handler failed; the server is told internal-error and nothing else")
        content = encode(Refusal(code="internal-error"))
    return Message(content, reply_to=message)
