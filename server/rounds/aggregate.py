"""From a round's answers to one delta by tensor."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from torch import Tensor

from conclave.server.aggregate.aggregation import Aggregator
from conclave.server.aggregate.balancing import Balancer
from conclave.server.aggregate.robust import make_aggregator
from conclave.server.node_level.mechanism import NodeLevelSum
from conclave.server.replies.validation import Reason
from conclave.server.rounds.ask import Requests
from conclave.server.rounds.check import Accepted, Answer, Dropped
from conclave.server.rounds.outcome import Replies
from conclave.server.rounds.terms import Books, Terms


@dataclass(frozen=True)
class Gathered:
    """The answers of a round: counted, and their deltas and loads where these are made into one.

    loads: None where nothing is balanced.
    """

    replies: Replies
    deltas: Aggregator | NodeLevelSum
    loads: Balancer | None

    @property
    def holders(self) -> Mapping[str, int]:
        """Wire name → how many accepted deltas hold the tensor. Where the node is the unit, that is nobody's to see."""
        return self.deltas.holders if isinstance(self.deltas, Aggregator) else {}


def gather(answers: Iterable[Answer], requests: Requests, terms: Terms, books: Books) -> Gathered:
    """Add up the answers as they come; no delta is kept that the aggregation does not need."""
    names = [asked.node.fingerprint for asked in requests.asked.values()]
    level, balancing = books.node_level, terms.balancing
    deltas = make_aggregator(terms.federation.aggregation, names) if level is None else level.collect(names)
    loads = None if balancing is None else Balancer(terms.plan, balancing)
    refused, dropped_by, trained = Counter[str](), Counter[Reason](), []
    bytes_up, answered = 0, 0
    for answer in answers:
        bytes_up += answer.bytes_up
        if isinstance(answer, Dropped):
            dropped_by[answer.reason] += 1
        elif isinstance(answer, Accepted):
            held, node = answer.asked.request.held, answer.asked.node
            trained.append(held)
            if loads is not None:
                loads.take(node.fingerprint, held, answer.loads, node.declared_size, answer.contribution.weight)
        else:
            refused[answer.code] += 1
        if answer.asked is not None:
            answered += 1
            contribution = answer.contribution if isinstance(answer, Accepted) else None
            deltas.add(answer.asked.node.fingerprint, contribution)
    missing = len(requests.asked) - answered
    return Gathered(Replies(refused, dropped_by, missing, tuple(trained), bytes_up), deltas, loads)


def aggregate(gathered: Gathered, terms: Terms, books: Books) -> dict[str, Tensor] | None:
    """Return wire name → float32 delta. A tensor that too few nodes returned is left out, and keeps its value.

    None where fewer than ``min_replies`` replies are acceptable: such a round changes nothing. Where the node is the
    unit there is a delta even if nobody answered: that must not show.
    """
    if isinstance(gathered.deltas, Aggregator):
        enough = gathered.replies.accepted >= terms.federation.min_replies
        return gathered.deltas.result(terms.federation.min_holders) if enough else None
    if books.node_level is None:
        raise ValueError("a noised sum is published by the account that pays for it")
    return books.node_level.publish(gathered.deltas)
