"""What each reply of a round is: accepted, the node's refusal, or dropped, and for which reason."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Literal

from flwr.app import Message
from torch import Tensor

from conclave.protocol.messages import Code, ProtocolError
from conclave.server.aggregate.aggregation import WeightedDelta
from conclave.server.replies.validation import Asked, DroppedError, Reason, ReplyChecker
from conclave.server.rounds.ask import Requests
from conclave.server.rounds.traffic import exchange_bytes

log = logging.getLogger("conclave.server")


@dataclass(frozen=True)
class Accepted:
    """A reply that counts. loads: those of its experts, noised; empty where the plan does not ask for them."""

    asked: Asked
    contribution: WeightedDelta
    loads: Mapping[str, Tensor]
    bytes_up: int


@dataclass(frozen=True)
class Refused:
    """The node's word that it does not take part; the code says why."""

    asked: Asked
    code: Code
    bytes_up: int


@dataclass(frozen=True)
class Dropped:
    """A reply that does not count. asked: None where nobody waits for it (not asked, or answered before)."""

    asked: Asked | None
    reason: Reason
    bytes_up: int


Answer = Accepted | Refused | Dropped


def check(
    replies: Iterable[Message], requests: Requests, checker: ReplyChecker, weights: Literal["declared", "uniform"]
) -> Iterator[Answer]:
    """Yield what each reply is, in the order in which they come; only a node's first counts.

    ``replies`` may be a generator that trains as it goes: none is kept here.
    """
    waiting = dict(requests.asked)
    for reply in replies:
        flower_id = reply.metadata.src_node_id
        asked = waiting.pop(flower_id, None)
        if asked is None:
            reason: Reason = "duplicate" if flower_id in requests.asked else "not-asked"
            _warn(f"node {flower_id}", reason)
            yield Dropped(None, reason, bytes_up=0)
        else:
            yield _answer(reply, asked, checker, weights)


def _answer(reply: Message, asked: Asked, checker: ReplyChecker, weights: Literal["declared", "uniform"]) -> Answer:
    name = asked.node.fingerprint
    bytes_up = exchange_bytes(reply.content) if reply.has_content() else 0
    try:
        delta, loads = checker.parts_of(reply, asked)
    except DroppedError as error:
        _warn(f"node {name}", error.reason, str(error))
        return Dropped(asked, error.reason, bytes_up)
    except ProtocolError as error:
        log.warning("node %s refused: %s", name, error.code)
        return Refused(asked, error.code, bytes_up)
    weight = float(asked.node.declared_size) if weights == "declared" else 1.0
    return Accepted(asked, WeightedDelta(name, weight, delta), loads, bytes_up)


def _warn(who: str, reason: Reason, detail: str = "") -> None:
    log.warning("%s: a reply was dropped (%s)%s", who, reason, f": {detail}" if detail else "")
