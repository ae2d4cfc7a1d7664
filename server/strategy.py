"""Conclave's strategy: who gets which experts, and what becomes of the replies.

Not FedAvg: nodes train different experts, so replies have different keys, which FedAvg refuses.
"""

from __future__ import annotations

import logging
import math
from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field

from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord
from flwr.serverapp import Grid
from flwr.serverapp.strategy import Strategy
from torch import Tensor

from clients.protocol import (
    QUERY_CHOOSE,
    TRAIN,
    ChooseRequest,
    Description,
    Plan,
    ProtocolError,
    TrainReply,
    TrainRequest,
    body_of,
    decode,
    encode,
    encode_tensors,
    encodings_of,
    norm_growth,
    norms,
    tensors_of,
    wire_form,
)
from model import HeldExperts
from privacy.canonical import sha256
from privacy.ledger import SignedHead
from server.aggregation import Averager, Contribution, ServerOptimizer, norm_bound
from server.assignment import assign
from server.balancing import BIAS, Balancer, BalancingConfig, load_bound, plausible, split_loads
from server.cohort import choose_cohort
from server.config import FederationConfig
from server.node_account import NodeLevel
from server.node_level import NodeLevelSum
from server.receipts import EMPTY_RECEIPT, KeptReceipt, ReceiptBook
from server.traffic import exchange_bytes
from server.wishes import Wishes

log = logging.getLogger("conclave.server")


@dataclass
class RoundTally:
    """What one round came to. Bytes count Flower's objects on the wire.

    refused: code → nodes that refused with it. dropped: replies that were malformed, non-finite, of the wrong
    shape, for another assignment, or over a bound. missing: nodes that sent nothing in time. trained: the experts of
    each accepted reply.
    loads: by layer and expert, the noised load relative to what its holders expected; None where nobody held the
        expert, or where nothing is balanced.
    """

    asked: int = 0
    accepted: int = 0
    refused: Counter[str] = field(default_factory=Counter)
    dropped: int = 0
    missing: int = 0
    bytes_down: int = 0
    bytes_up: int = 0
    held_back: int = 0
    trained: list[HeldExperts] = field(default_factory=list)
    loads: list[list[float | None]] | None = None


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
        node_level: NodeLevel | None = None,
        balancing: BalancingConfig | None = None,
        wishes: Wishes | None = None,
    ) -> None:
        """Set up a run.

        Args:
            scenario: its name, which nodes may allow or not.
            balancing: how selection biases follow the loads that nodes release; the plan asks for them.
            wishes: what nodes chose, where they do.
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
        self.wishes = wishes
        self.nodes = {description.fingerprint: (node, description) for node, description in nodes.items()}
        self.optimizer = ServerOptimizer(config.optimizer, tensors)
        self.tally = RoundTally()
        self._asked: dict[int, tuple[str, HeldExperts]] = {}
        self._balancer = None if balancing is None else Balancer(plan, balancing)

    def summary(self) -> None:
        """Log the configuration."""
        log.info(
            "%d nodes, assignment %s, weights %s",
            len(self.nodes),
            self.config.assignment,
            self.config.weights,
        )

    def keep_only(self, nodes: Collection[int]) -> None:
        """Go on with these nodes (Flower ids) only."""
        self.nodes = {name: entry for name, entry in self.nodes.items() if entry[0] in nodes}

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> list[Message]:
        """Return the round's requests: to each node of the cohort, its experts and the shared weights."""
        self.tally = RoundTally()
        self._asked = {self.nodes[name][0]: (name, held) for name, held in self._assignment(server_round).items()}
        tensors: dict[str, ArrayRecord] = {}  # nodes with equal assignments share the tensors, encoded once
        messages = []
        for node, (name, held) in self._asked.items():
            if str(held) not in tensors:
                tensors[str(held)] = self._tensors(held)
            content = encode(self._request(server_round, held, self.receipts.latest(name)), tensors[str(held)])
            messages.append(Message(content, node, TRAIN, group_id=str(server_round)))
        self.tally.asked = len(messages)
        self.tally.bytes_down = sum(exchange_bytes(message.content) for message in messages)
        return messages

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """Validate the replies, average per group and step the global model.

        A reply that does not hold exactly what was asked for is dropped and counted; the run goes on. A round
        without an acceptable reply changes nothing.
        """
        names = [name for name, _ in self._asked.values()]
        averager = Averager(names) if self.node_level is None else self.node_level.collect(names)
        if self._balancer is not None:
            self._balancer.begin_round()
        for reply in replies:  # may be a generator that trains as it goes: a reply is added and forgotten
            asked = self._asked.pop(reply.metadata.src_node_id, None)
            if asked is None:  # not asked this round, or answered already
                self.tally.dropped += 1
                continue
            name, held = asked
            contribution = self._validated(reply, name, held, server_round)
            if contribution is not None:
                self.tally.accepted += 1
                self.tally.trained.append(held)
            averager.add(name, contribution)
        self.receipts.save()  # before anything is done with the replies
        self.tally.missing = len(self._asked)  # who answered has been struck off
        if isinstance(averager, NodeLevelSum) and self.node_level is not None:
            averaged = self.node_level.publish(averager)  # also where nobody answered: that nobody did must not show
        elif isinstance(averager, Averager) and self.tally.accepted:
            averaged = averager.result(self.config.min_holders)
        else:
            return None, None
        self.tally.held_back = len(self.optimizer.tensors) - len(averaged)
        # A selection bias is the server's to move: what a node sends for it is 0, or not honest.
        averaged = {name: mean for name, mean in averaged.items() if not name.endswith(f"/{BIAS}")}
        self.optimizer.step(averaged, self.config.optimizer.rate(server_round, self.plan.rounds))
        if self._balancer is not None:
            self.tally.loads = self._balancer.relative_loads()
            self._balancer.move(self.optimizer.tensors, server_round)
        return ArrayRecord(self.optimizer.snapshot()), MetricRecord({"accepted": self.tally.accepted})

    def configure_evaluate(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> list[Message]:
        """Ask nothing: the server evaluates on public data; private evaluation would be a charged release."""
        return []

    def aggregate_evaluate(self, server_round: int, replies: Iterable[Message]) -> MetricRecord | None:
        """Return nothing; see :meth:`configure_evaluate`."""
        return None

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
        cohort = choose_cohort(list(self.nodes), self.config.cohort, self.seed, server_round)
        assigned = assign(
            self.config.assignment,
            capacities={name: self.nodes[name][1].expert_capacity for name in cohort},
            experts=self.plan.model.experts.routed,
            per_node=self.config.experts_per_node,
            layers=self.plan.model.layers,
            seed=self.seed,
            round_number=server_round,
            roster={name: description.expert_capacity for name, (_, description) in self.nodes.items()},
            min_holders=self.config.min_holders,
        )
        return assigned if self.wishes is None else self.wishes.assign(assigned, self.config.min_holders)

    def ask_wishes(self, server_round: int, grid: Grid, timeout: float) -> None:
        """Let nodes choose experts, where that is due before a round. Who does not answer keeps what it has."""
        if self.wishes is None or not self.wishes.due(server_round):
            return
        snapshot = self.optimizer.snapshot()
        tensors = encode_tensors({name: snapshot[name] for name in self.plan.choosing_shapes})
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
                self.wishes.take(server_round, description, self.run_id, reply.content, self.receipts)
            except ProtocolError as error:
                log.warning("node %s did not choose: %s", name, error)
        self.receipts.save()
        self.wishes.finish(server_round)

    def _request(self, server_round: int, held: HeldExperts, receipt: SignedHead | None) -> TrainRequest:
        return TrainRequest(
            run_id=self.run_id, scenario=self.scenario, round=server_round, plan=self.plan, held=held, receipt=receipt
        )

    def _tensors(self, held: HeldExperts) -> ArrayRecord:
        snapshot = self.optimizer.snapshot()
        return self._packed({name: snapshot[name] for name in self.plan.travelling(held)})

    def _packed(self, tensors: Mapping[str, Tensor]) -> ArrayRecord:
        shapes = {name: tensor.shape for name, tensor in tensors.items()}
        # To nearest: nodes with equal experts get equal weights, and nothing adds up, for the server keeps its own.
        return encode_tensors(wire_form(shapes, encodings_of(self.plan.traffic.model, shapes)).encode(tensors, None))

    def _validated(self, reply: Message, name: str, held: HeldExperts, server_round: int) -> Contribution | None:
        if not reply.has_content():
            self.tally.dropped += 1
            log.warning("node %s failed to answer", name)
            return None
        self.tally.bytes_up += exchange_bytes(reply.content)
        expected = self.plan.travelling(held)
        encodings = encodings_of(self.plan.traffic.delta, expected)
        try:
            answer = decode(reply.content, TrainReply)
            answered = tensors_of(reply.content, self.plan.reply_shapes(held), encodings)
            delta, loads = split_loads(answered, held)
        except ProtocolError as error:
            self._count_refusal(name, error)
            return None
        description = self.nodes[name][1]
        wrong = self.receipts.why_refused(description, answer.receipt)
        if wrong is not None:
            self.tally.dropped += 1
            log.warning("node %s: its receipt was refused: %s; dropped", name, wrong)
            return None
        # Kept whatever becomes of the delta: the node was charged for it.
        self.receipts.keep(
            KeptReceipt(
                round=server_round,
                node=name,
                run_id=self.run_id,
                plan_hash=self.plan.hash,
                charge_id=answer.charge_id,
                output_hash=sha256(body_of(reply.content)),
                signing_key=description.signing_key,
                receipt=answer.receipt,
            )
        )
        size = description.declared_size
        count = sum(shape.numel() for shape in expected.values())
        norm = math.hypot(*norms(delta))
        bound = norm_bound(self.plan, count, size, server_round) * norm_growth(expected, encodings)
        if self.node_level is None and norm > bound:
            self.tally.dropped += 1
            log.warning("node %s: the norm of its delta is above the bound; dropped", name)
            return None
        if loads and not plausible(loads, load_bound(self.plan, size)):
            self.tally.dropped += 1
            log.warning("node %s: its expert loads are above the bound; dropped", name)
            return None
        weight = float(size) if self.config.weights == "declared" else 1.0
        if self._balancer is not None:
            self._balancer.take(name, held, loads, size, weight)
        return Contribution(name, weight, delta)

    def _count_refusal(self, name: str, error: ProtocolError) -> None:
        if error.code == "bad-request":
            self.tally.dropped += 1
            log.warning("node %s sent an unusable reply: %s", name, error)
        else:
            self.tally.refused[error.code] += 1
            log.warning("node %s refused: %s", name, error.code)
