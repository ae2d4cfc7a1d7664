"""The Flower ClientApp: decode, call a plain function, encode. Nothing else leaves from here."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import TypeVar

from flwr.app import Context, Message, RecordDict
from flwr.clientapp import ClientApp

from conclave.base.errors import BadInputError
from conclave.clients.node import Node
from conclave.protocol.codec import decode, encode
from conclave.protocol.messages import (
    AdmitRequest,
    ChooseRequest,
    CloseRequest,
    DescribeRequest,
    EvaluateRequest,
    ProtocolError,
    Refusal,
    TrainRequest,
)

log = logging.getLogger("conclave.node")

_Request = TypeVar("_Request", ChooseRequest, TrainRequest, EvaluateRequest)

OpenNode = Callable[[Context], Node]
"""How an app finds the node it answers as. Of a deployed one it is given: nothing in a message leads to another."""


def make_client_app(open_node: OpenNode) -> ClientApp:
    """Return the Flower ClientApp that answers as the nodes that ``open_node`` finds.

    open_node: may raise ProtocolError, of which the server is told the code.
    """
    app = ClientApp()

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
        return _answer_release(message, context, open_node, ChooseRequest, Node.choose)

    @app.train()
    def train(message: Message, context: Context) -> Message:
        """Train one round and reply with the delta of exactly what was sent."""
        return _answer_release(message, context, open_node, TrainRequest, Node.train)

    @app.evaluate()
    def evaluate(message: Message, context: Context) -> Message:
        """Measure a model on held-out units and reply with the noised sums."""
        return _answer_release(message, context, open_node, EvaluateRequest, Node.evaluate)

    return app


def _answer_release(
    message: Message,
    context: Context,
    open_node: OpenNode,
    kind: type[_Request],
    handle: Callable[[Node, _Request, RecordDict], RecordDict],
) -> Message:
    """Answer a request for a release with what the node makes of it and of the tensors that came with it."""

    def run() -> RecordDict:
        request = decode(message.content, kind)
        return handle(open_node(context), request, message.content)

    return _answer(message, run)


def _answer(message: Message, handle: Callable[[], RecordDict]) -> Message:
    """Run a handler; the details of an error stay on the node, and the server gets a code.

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
