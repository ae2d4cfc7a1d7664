"""What makes a reply acceptable. Everything in it is hostile until it has been compared with what was asked."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal

from flwr.app import Message, RecordDict
from torch import Tensor

from conclave.base.canonical import sha256
from conclave.base.errors import ConclaveError
from conclave.privacy.gradients.clipping import AdaptiveClip
from conclave.privacy.ledger.entry import charge_id_of
from conclave.privacy.releases.load_histogram import DELTA
from conclave.privacy.training.local_optimizers import AdamConfig
from conclave.protocol.charges import ChargeKind
from conclave.protocol.codec import body_of, decode, norms, tensors_of
from conclave.protocol.encodings import encodings_of, norm_growth
from conclave.protocol.messages import (
    Committed,
    Description,
    EvaluateReply,
    EvaluateRequest,
    Flaw,
    LedgerIdentity,
    ProtocolError,
    TrainReply,
    TrainRequest,
)
from conclave.protocol.plan import Plan
from conclave.server.aggregate.balancing import load_bound, plausible, split_loads
from conclave.server.replies.noise_likeness import NoiseTest
from conclave.server.replies.receipts import KeptReceipt, ReceiptBook

Reason = (
    Flaw
    | Literal[
        "no-answer", "not-asked", "duplicate", "bad-receipt", "replay", "wrong-charge", "over-norm", "not-noise-like"
    ]
)
"""Why a reply was dropped.

no-answer: Flower reports an error in its place. not-asked: of a node that the round asked nothing. duplicate: not the
first of its node. bad-receipt: does not continue the node's ledger, or is not signed with its key. replay: of a charge
that was answered before, or with its receipt. wrong-charge: for other weights, another round, run or plan than was
asked. over-norm: its delta, or its loads, are larger than an honest node's. not-noise-like: its delta is not the noise
that the plan asks for and a signal, see :mod:`conclave.server.replies.noise_likeness`. The others
(:data:`conclave.protocol.messages.Flaw`) are about its document and its tensors.
"""


class DroppedError(ConclaveError):
    """A reply does not count."""

    def __init__(self, reason: Reason, detail: str) -> None:
        super().__init__(detail)
        self.reason: Reason = reason


@contextmanager
def dropping() -> Iterator[None]:
    """Drop a message that is not what it must be. A node's refusal passes: that is an answer."""
    try:
        yield
    except ProtocolError as error:
        if error.code != "bad-request":
            raise
        raise DroppedError(error.flaw, str(error)) from error


@dataclass(frozen=True, kw_only=True)
class AskedCharge:
    """The one charge that pays for the answer to what a node was asked, as the node works it out, too.

    node: its fingerprint. ledger: the one that pays, of the side that the kind of message is for.
    model_in_hash: of exactly what went with the question.
    """

    kind: ChargeKind
    node: str
    ledger: LedgerIdentity
    run_id: str
    round: int
    plan_hash: str
    model_in_hash: str

    @property
    def id(self) -> str:
        """The charge's name, which is the hash of all this."""
        return charge_id_of(
            self.kind,
            ledger_id=self.ledger.ledger_id,
            run_id=self.run_id,
            round_number=self.round,
            plan_hash=self.plan_hash,
            model_in_hash=self.model_in_hash,
        )


def accept_charge(asked: AskedCharge, answer: Committed, body: bytes, receipts: ReceiptBook) -> None:
    """Check that an answer of any kind is paid for by the charge for exactly what was asked; keep its receipt.

    One charge pays for one answer: whose receipt is of another charge, or whose charge has another receipt, was not
    charged for this.

    Args:
        body: the answer's tensors as they arrived.

    Raises:
        DroppedError: it is not.
    """
    wrong = receipts.why_refused(asked.ledger, answer.receipt)
    if wrong is not None:
        raise DroppedError("bad-receipt", f"its receipt was refused: {wrong}")
    ledger = asked.ledger.fingerprint
    if not receipts.is_new_or_same(ledger, answer.charge_id, answer.receipt):
        raise DroppedError("replay", "its receipt is of another charge, or its charge has another receipt")
    if answer.charge_id != asked.id:
        if receipts.has_charge(ledger, answer.charge_id):
            raise DroppedError("replay", "its charge was answered before")
        raise DroppedError("wrong-charge", "its charge is not for what was asked")
    receipts.keep(
        KeptReceipt(
            round=asked.round,
            node=asked.node,
            run_id=asked.run_id,
            plan_hash=asked.plan_hash,
            charge_id=answer.charge_id,
            output_hash=sha256(body),
            signing_key=asked.ledger.signing_key,
            receipt=answer.receipt,
            kind=asked.kind,
        )
    )


@dataclass(frozen=True)
class Asked:
    """What a node was asked in a round: the request and the message that carries it."""

    node: Description
    request: TrainRequest | EvaluateRequest
    content: RecordDict


class ChargeChecker:
    """Works out the charges for a model that went to several nodes, and compares replies with them."""

    def __init__(self, plan: Plan, receipts: ReceiptBook, kind: ChargeKind) -> None:
        self._plan_hash = plan.hash
        self._receipts = receipts
        self._kind: ChargeKind = kind
        self._model_in: dict[str, str] = {}  # of a broadcast, once for all nodes that got it

    def accept(self, answer: TrainReply | EvaluateReply, body: bytes, asked: Asked, ledger: LedgerIdentity) -> None:
        """Check that ``ledger`` paid for an answer to a request, see :func:`accept_charge`.

        Raises:
            DroppedError: it did not.
        """
        held = str(asked.request.held)
        if held not in self._model_in:
            self._model_in[held] = asked.request.model_in_hash(body_of(asked.content))
        charge = AskedCharge(
            kind=self._kind,
            node=asked.node.fingerprint,
            ledger=ledger,
            run_id=asked.request.run_id,
            round=asked.request.round,
            plan_hash=self._plan_hash,
            model_in_hash=self._model_in[held],
        )
        accept_charge(charge, answer, body, self._receipts)


class ReplyChecker:
    """Compares the replies of one round with what was asked."""

    def __init__(
        self, plan: Plan, receipts: ReceiptBook, *, bounded: bool = True, noise_test: NoiseTest | None = None
    ) -> None:
        """Check replies to requests under ``plan``; good receipts go into ``receipts``.

        Args:
            bounded: drop a delta above the norm bound; if the node is the unit, it is scaled down instead.
            noise_test: drops a delta that does not look like its noise; it remembers every acceptable one.
        """
        self._bounded, self._noise_test = bounded, noise_test
        self._plan = plan
        self._charges = ChargeChecker(plan, receipts, "train")

    def parts_of(self, reply: Message, asked: Asked) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Return the delta of an acceptable reply, and the expert loads beside it, if the plan asks for them.

        A good receipt for what was asked is kept whatever becomes of the delta: the node was charged for it.

        Raises:
            DroppedError: it does not count.
            ProtocolError: the node refused; the code says why.
        """
        if not reply.has_content():
            raise DroppedError("no-answer", "it failed to answer")
        held = asked.request.held
        expected = self._plan.travelling(held)
        encodings = encodings_of(self._plan.traffic.delta, expected)
        with dropping():
            answer = decode(reply.content, TrainReply)
            self._charges.accept(answer, body_of(reply.content), asked, asked.node)
            delta, loads = split_loads(tensors_of(reply.content, self._plan.reply_shapes(held), encodings), held)
        count, size = sum(shape.numel() for shape in expected.values()), asked.node.declared_size
        bound = norm_bound(self._plan, count, size, asked.request.round) * norm_growth(expected, encodings)
        if self._bounded and math.hypot(*norms(delta)) > bound:
            raise DroppedError("over-norm", "the norm of its delta is above the bound")
        if loads and not plausible(loads, load_bound(self._plan, size)):
            raise DroppedError("over-norm", "its expert loads are above the bound")
        if self._noise_test is not None:
            standardised = self._noise_test.standardise(held, delta, size)
            flaw = self._noise_test.flaw(asked.node.fingerprint, standardised)
            if flaw is not None:
                raise DroppedError("not-noise-like", flaw)
            self._noise_test.remember(asked.node.fingerprint, standardised)
        return delta, loads


def norm_bound(plan: Plan, parameters: int, declared_size: int, round_number: int) -> float:
    """Return the largest plausible L2 norm of an honest delta of a round; infinite without privacy.

    ``3·lr·steps·(C + σC√d/(q·size))``: the clipped gradient and the noise on d parameters. Noise is by far
    the larger part, so the bound must allow for it. Momentum m makes steps up to 1/(1 − m) times as long, Adam up to
    1/floor times, and an adaptive bound may have grown with every step since round one.
    """
    if plan.noise_multiplier is None:
        return math.inf
    clip, rate = plan.privacy.clip, plan.privacy.sampling_rate
    multiplier, optimizer = plan.noise_parts[DELTA], plan.training.optimizer
    if plan.privacy.clipping == "adaptive":
        rule = AdaptiveClip()
        multiplier = rule.gradient_noise_multiplier(multiplier, rate * declared_size)
        clip *= math.exp(min(rule.rate * rule.quantile * (round_number * plan.training.steps - 1), 100.0))
    noise = multiplier * clip * math.sqrt(parameters) / (rate * declared_size)
    longer = 1.0 / optimizer.floor if isinstance(optimizer, AdamConfig) else 1.0 / (1.0 - optimizer.momentum)
    return 3.0 * longer * plan.training.learning_rate * plan.training.steps * (clip + noise)
