"""Conclave's strategy: who gets which experts, and what becomes of the replies.

Not FedAvg: nodes train different experts, so replies have different keys, which FedAvg refuses.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord
from flwr.serverapp import Grid
from flwr.serverapp.strategy import Strategy
from torch import Tensor

from conclave.base.canonical import sha256
from conclave.model.experts.config import HeldExperts
from conclave.privacy.ledger import SignedHead
from conclave.protocol.codec import encode, encode_tensors
from conclave.protocol.encodings import encodings_of, wire_form
from conclave.protocol.messages import (
    EVALUATE,
    QUERY_CHOOSE,
    TRAIN,
    ChooseRequest,
    Description,
    EvaluateRequest,
    ProtocolError,
    TrainReply,
    TrainRequest,
)
from conclave.protocol.plan import Plan
from conclave.server.aggregate.aggregation import WeightedDelta
from conclave.server.aggregate.balancing import BIAS, Balancer, BalancingConfig
from conclave.server.aggregate.optimizer import ServerOptimizer
from conclave.server.aggregate.robust import make_aggregator
from conclave.server.aggregate.step_scale import step_scales
from conclave.server.assign.assignment import assign
from conclave.server.assign.choices import Choices
from conclave.server.assign.cohort import choose_cohort
from conclave.server.config import FederationConfig
from conclave.server.coverage import expected_holders
from conclave.server.evaluate.private import PrivateEvaluation, collect
from conclave.server.node_level.rounds import NodeLevelRounds
from conclave.server.replies.noise_likeness import NoiseTest
from conclave.server.replies.receipts import EMPTY_RECEIPT, ReceiptBook
from conclave.server.replies.validation import Asked, DroppedError, Reason, ReplyChecker
from conclave.server.traffic import exchange_bytes

log = logging.getLogger("conclave.server")


@dataclass
class RoundTally:
    """What one round came to. Bytes count Flower's objects on the wire.

    refused: code → nodes that refused with it. dropped_by: reason → replies that did not count for it. missing: nodes
    that sent nothing in time. changed: whether the model moved; with too few acceptable replies nothing does. trained:
    the experts of each accepted reply.
    evaluation: what nodes measured on held-out units after the round; None where nothing was due.
    loads: by layer and expert, the noised load relative to what its holders expected; None where nobody held the
        expert, or where nothing is balanced.
    """

    asked: int = 0
    accepted: int = 0
    refused: Counter[str] = field(default_factory=Counter)
    dropped_by: Counter[Reason] = field(default_factory=Counter)
    missing: int = 0
    bytes_down: int = 0
    bytes_up: int = 0
    held_back: int = 0
    trained: list[HeldExperts] = field(default_factory=list)
    loads: list[list[float | None]] | None = None
    evaluation: PrivateEvaluation | None = None
    changed: bool = False

    @property
    def dropped(self) -> int:
        """Replies that did not count, for whatever reason."""
        return self.dropped_by.total()


class ExpertStrategy(Strategy):
    """Sample a cohort, assign experts, send each node its part, aggregate per parameter group.

    The strategy owns the global tensors (``optimizer``); the ``arrays`` arguments of Flower's interface are
    what it returned last and are not read.
    """

    def __init__(
        self,
        *,
        plan: Plan,
        config: FederationConfig,
        seed: int,
        run_id: str,
        nodes: Mapping[int, Description],
        tensors: Mapping[str, Tensor],
        scenario: str,
        receipts: ReceiptBook | None = None,
        node_level: NodeLevelRounds | None = None,
        balancing: BalancingConfig | None = None,
        choices: Choices | None = None,
    ) -> None:
        """Set up a run.

        Args:
            scenario: its name, which nodes may allow or not.
            balancing: how selection biases follow the loads that nodes release; the plan asks for them.
            choices: what nodes chose, where they do.
            receipts: what is kept of the nodes' ledgers, in memory only if not given.
            node_level: where the node is the unit: draws cohorts, and makes of the replies what may be published.
            nodes: Flower node id → what the node said about itself; fingerprints are distinct.
            tensors: wire name → float32, the initial global model.
        """
        self.plan = plan
        self.config = config
        self.seed = seed
        self.run_id = run_id
        self.scenario = scenario
        self.receipts = receipts or ReceiptBook()
        self.node_level = node_level
        self.choices = choices
        self.meet(nodes)
        self.optimizer = ServerOptimizer(config.optimizer, tensors)
        self.noise_test = None if config.noise_test is None else NoiseTest(plan, config.noise_test)
        self.tally = RoundTally()
        self._asked: dict[int, Asked] = {}
        self._answered: set[int] = set()
        self._evaluated: dict[int, Asked] = {}
        self._balancer = None if balancing is None else Balancer(plan, balancing)

    def summary(self) -> None:
        """Log the configuration."""
        log.info(
            "%d nodes, assignment %s, weights %s",
            len(self.nodes),
            self.config.assignment,
            self.config.weights,
        )

    def meet(self, nodes: Mapping[int, Description]) -> None:
        """Go on with these nodes, by Flower node id; a node is the same under whatever id its key comes."""
        self.nodes = {description.fingerprint: (node, description) for node, description in nodes.items()}

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> list[Message]:
        """Return the round's requests: to each node of the cohort, its experts and the shared weights."""
        self.tally = RoundTally()
        assignment = self._assignment(server_round)
        self._asked, self._answered = {}, set()
        model = self.optimizer.snapshot()
        tensors: dict[str, ArrayRecord] = {}  # nodes with equal assignments share the tensors, encoded once
        messages = []
        for name, held in assignment.items():
            node, description = self.nodes[name]
            if str(held) not in tensors:
                tensors[str(held)] = self._tensors(held, model)
            request = self._request(server_round, held, self.receipts.latest(name))
            content = encode(request, tensors[str(held)])
            self._asked[node] = Asked(description, request, content)
            messages.append(Message(content, node, TRAIN, group_id=str(server_round)))
        self.tally.asked = len(messages)
        self.tally.bytes_down = sum(exchange_bytes(message.content) for message in messages)
        return messages

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """Validate the replies, average per group and step the global model.

        A reply that does not hold exactly what was asked for is dropped and counted; the run goes on. A round with
        fewer than ``min_replies`` acceptable replies changes nothing.
        """
        checker = ReplyChecker(self.plan, self.receipts, bounded=self.node_level is None, noise_test=self.noise_test)
        names = [asked.node.fingerprint for asked in self._asked.values()]
        aggregator = make_aggregator(self.config.aggregation, names)
        collected = None if self.node_level is None else self.node_level.collect(names)
        if self._balancer is not None:
            self._balancer.begin_round()
        for reply in replies:  # may be a generator that trains as it goes: a reply is added and forgotten
            node = reply.metadata.src_node_id
            asked = self._asked.pop(node, None)
            if asked is None:
                self._drop(f"node {node}", "duplicate" if node in self._answered else "not-asked")
                continue
            self._answered.add(node)
            contribution = self._contribution(reply, asked, checker)
            if contribution is not None:
                self.tally.accepted += 1
                self.tally.trained.append(asked.request.held)
            (aggregator if collected is None else collected).add(asked.node.fingerprint, contribution)
        self.receipts.save()  # before anything is done with the replies
        self.tally.missing = len(self._asked)  # who answered has been struck off
        if collected is not None and self.node_level is not None:
            aggregated = self.node_level.publish(collected)  # also where nobody answered: that must not show
        elif self.tally.accepted >= self.config.min_replies:
            aggregated = aggregator.result(self.config.min_holders)
        else:
            return None, None
        self.tally.held_back = len(self.optimizer.tensors) - len(aggregated)
        self.tally.changed = True
        # A selection bias is the server's to move: what a node sends for it is 0, or not honest.
        aggregated = {name: delta for name, delta in aggregated.items() if not name.endswith(f"/{BIAS}")}
        scales = {}
        if self.config.step_scale == "contributions":
            capacities = [description.expert_capacity for _, description in self.nodes.values()]
            expected = expected_holders(self.config, self.plan.model.experts.routed, capacities)
            scales = step_scales(expected, aggregator.holders)
        self.optimizer.step(aggregated, self.config.optimizer.rate(server_round, self.plan.rounds), scales)
        if self._balancer is not None:
            self.tally.loads = self._balancer.relative_loads()
            self._balancer.move(self.optimizer.tensors, server_round)
        return ArrayRecord(self.optimizer.snapshot()), MetricRecord({"accepted": self.tally.accepted})

    def configure_evaluate(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> list[Message]:
        """Return the requests to measure the current model on held-out units; see :meth:`evaluation_requests`."""
        return self.evaluation_requests(server_round, self.optimizer.snapshot())

    def evaluation_requests(self, server_round: int, model: Mapping[str, Tensor]) -> list[Message]:
        """Return the requests to measure a model on held-out units, where the plan has that after this round.

        All nodes that hold units out are asked, also those that the round left out.

        Args:
            model: wire name → float32, what is published after the round.
        """
        evaluation = self.plan.evaluation
        self._evaluated = {}
        if evaluation is None or not evaluation.due(server_round, self.plan.rounds):
            return []
        evaluating = {name: found for name, found in self.nodes.items() if found[1].held_out is not None}
        assignment = self._assigned(list(evaluating), server_round)
        every, tensors = self.plan.model.all_experts, dict[str, ArrayRecord]()
        messages = []
        for name, (node, description) in evaluating.items():
            fits = description.expert_capacity >= self.plan.model.experts.routed
            held = every if evaluation.experts == "all" and fits else assignment[name]
            if str(held) not in tensors:
                tensors[str(held)] = self._tensors(held, model)
            side = description.held_out
            request = EvaluateRequest(
                run_id=self.run_id,
                scenario=self.scenario,
                round=server_round,
                plan=self.plan,
                held=held,
                receipt=None if side is None else self.receipts.latest(side.fingerprint),
            )
            content = encode(request, tensors[str(held)])
            self._evaluated[node] = Asked(description, request, content)
            messages.append(Message(content, node, EVALUATE, group_id=str(server_round)))
        return messages

    def aggregate_evaluate(self, server_round: int, replies: Iterable[Message]) -> MetricRecord | None:
        """Check and pool what nodes measured; see :mod:`conclave.server.evaluate.private`."""
        if not self._evaluated:
            return None
        self.tally.evaluation = collect(self.plan, self._evaluated, replies, self.receipts)
        self.receipts.save()
        mean = self.tally.evaluation.over_units
        return None if mean is None else MetricRecord({self.tally.evaluation.metric: mean.value})

    def full_model_bytes(self) -> int:
        """Return the bytes of one exchange (request and reply) that carried the whole model."""
        held = self.plan.model.all_experts
        snapshot = self.optimizer.snapshot()
        request = encode(self._request(1, held, EMPTY_RECEIPT), self._packed(snapshot))
        shapes = {name: tensor.shape for name, tensor in snapshot.items()}
        delta = wire_form(shapes, encodings_of(self.plan.traffic.delta, shapes)).encode(snapshot, bytes(32))
        reply = encode(TrainReply(charge_id="0" * 64, receipt=EMPTY_RECEIPT), delta)
        return exchange_bytes(request) + exchange_bytes(reply)

    def _assignment(self, server_round: int) -> dict[str, HeldExperts]:
        """Return who takes part in a round, and with which experts."""
        if self.node_level is not None:
            return self.node_level.begin(list(self.nodes), server_round)
        return self._assigned(
            choose_cohort(list(self.nodes), self.config.cohort, self.seed, server_round), server_round
        )

    def _assigned(self, names: Iterable[str], server_round: int) -> dict[str, HeldExperts]:
        """Return which experts these nodes hold in a round."""
        assigned = assign(
            self.config.assignment,
            capacities={name: self.nodes[name][1].expert_capacity for name in names},
            experts=self.plan.model.experts.routed,
            per_node=self.config.experts_per_node,
            layers=self.plan.model.layers,
            seed=self.seed,
            round_number=server_round,
            roster={name: description.expert_capacity for name, (_, description) in self.nodes.items()},
            min_holders=self.config.min_holders,
        )
        return assigned if self.choices is None else self.choices.assign(assigned, self.config.min_holders)

    def ask_choices(self, server_round: int, grid: Grid, timeout: float) -> None:
        """Let nodes choose experts, where that is due before a round. Who does not answer keeps what it has."""
        if self.choices is None or not self.choices.due(server_round):
            return
        snapshot = self.optimizer.snapshot()
        tensors = encode_tensors({name: snapshot[name] for name in self.plan.choosing_shapes})
        sent = sha256(tensors["body"].data)
        asked = {node: (name, description) for name, (node, description) in self.nodes.items()}
        messages = []
        for node, (name, _) in asked.items():
            request = ChooseRequest(
                run_id=self.run_id,
                scenario=self.scenario,
                round=server_round,
                plan=self.plan,
                receipt=self.receipts.latest(name),
            )
            messages.append(Message(encode(request, tensors), node, QUERY_CHOOSE))
        for reply in sorted(grid.send_and_receive(messages, timeout=timeout), key=lambda m: m.metadata.src_node_id):
            node = reply.metadata.src_node_id
            if node not in asked or not reply.has_content():
                continue
            name, description = asked.pop(node)
            try:
                self.choices.take(server_round, description, self.run_id, sent, reply.content, self.receipts)
            except (DroppedError, ProtocolError) as error:
                log.warning("node %s did not choose: %s", name, error)
        self.receipts.save()
        self.choices.finish(server_round)

    def _request(self, server_round: int, held: HeldExperts, receipt: SignedHead | None) -> TrainRequest:
        return TrainRequest(
            run_id=self.run_id, scenario=self.scenario, round=server_round, plan=self.plan, held=held, receipt=receipt
        )

    def _tensors(self, held: HeldExperts, model: Mapping[str, Tensor]) -> ArrayRecord:
        return self._packed({name: model[name] for name in self.plan.travelling(held)})

    def _packed(self, tensors: Mapping[str, Tensor]) -> ArrayRecord:
        shapes = {name: tensor.shape for name, tensor in tensors.items()}
        # To nearest: nodes with equal experts get equal weights, and nothing adds up, for the server keeps its own.
        return encode_tensors(wire_form(shapes, encodings_of(self.plan.traffic.model, shapes)).encode(tensors, None))

    def _contribution(self, reply: Message, asked: Asked, checker: ReplyChecker) -> WeightedDelta | None:
        name = asked.node.fingerprint
        if reply.has_content():
            self.tally.bytes_up += exchange_bytes(reply.content)
        try:
            delta, loads = checker.parts_of(reply, asked)
        except DroppedError as error:
            self._drop(f"node {name}", error.reason, str(error))
            return None
        except ProtocolError as error:
            self.tally.refused[error.code] += 1
            log.warning("node %s refused: %s", name, error.code)
            return None
        weight = float(asked.node.declared_size) if self.config.weights == "declared" else 1.0
        if self._balancer is not None:
            self._balancer.take(name, asked.request.held, loads, asked.node.declared_size, weight)
        return WeightedDelta(name, weight, delta)

    def _drop(self, who: str, reason: Reason, detail: str = "") -> None:
        self.tally.dropped_by[reason] += 1
        log.warning("%s: a reply was dropped (%s)%s", who, reason, f": {detail}" if detail else "")
