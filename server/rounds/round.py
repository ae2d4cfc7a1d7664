"""One round from top to bottom: choose, assign, ask, check, aggregate, step, balance, evaluate.

This is not a Flower ``Strategy``: the loop of that interface (``Strategy.start``) has no place for admission, choices
of experts, secret cohorts or checkpoints, so the server has its own loop and takes only the ``Grid`` from Flower.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from flwr.serverapp import Grid

from conclave.model.records import Records
from conclave.server.aggregate.step_scale import step_scales
from conclave.server.evaluate.private import PrivateEvaluation, collect
from conclave.server.evaluate.public import Evaluation, evaluate
from conclave.server.replies.validation import ReplyChecker
from conclave.server.rounds.aggregate import aggregate, gather
from conclave.server.rounds.ask import ask_to_evaluate, ask_to_train
from conclave.server.rounds.assign import assign_round
from conclave.server.rounds.check import check
from conclave.server.rounds.choose import let_nodes_choose
from conclave.server.rounds.coverage import expected_holders
from conclave.server.rounds.model_state import ModelState
from conclave.server.rounds.outcome import RoundOutcome
from conclave.server.rounds.terms import Books, Nodes, Terms


class Rounds:
    """The rounds of a run."""

    def __init__(
        self, grid: Grid, terms: Terms, model: ModelState, books: Books, public_test: Records | None = None
    ) -> None:
        """Go on from ``model``, which every round moves, and keep in ``books`` what nodes release.

        Args:
            public_test: public records to evaluate on after every round.
        """
        self._grid, self._terms, self._model, self._books = grid, terms, model, books
        self._public_test = public_test

    def go(self, number: int, nodes: Nodes) -> RoundOutcome:
        """Carry out a round with the nodes that are there: train, and measure what it came to.

        What a node sends that does not hold is dropped and counted; the round goes on.

        Raises:
            BadInputError: the account of the node level does not allow the round.
        """
        outcome = self._train(number, nodes)
        return replace(outcome, private=self._evaluate_on_nodes(number, nodes), public=self._evaluate_on_public())

    def _train(self, number: int, nodes: Nodes) -> RoundOutcome:
        """Choose, assign, ask, check, aggregate, step, balance. No delta outlives it."""
        terms, model, books = self._terms, self._model, self._books
        let_nodes_choose(self._grid, terms, books, nodes, model.tensors, number)
        assignment = assign_round(terms, books, nodes, number)
        requests = ask_to_train(terms, books, nodes, assignment, model.tensors, number)
        bytes_down = requests.bytes_down()
        replies = self._grid.send_and_receive(requests.messages(), timeout=terms.federation.reply_timeout_s)
        answers = check(replies, requests, self._checker(), terms.federation.weights)
        gathered = gather(answers, requests, terms, books)
        books.receipts.save()  # before anything is done with the replies
        delta = aggregate(gathered, terms, books)
        loads = None
        if delta is not None:
            model.step(number, delta, self._scales(gathered.holders, nodes))
            loads = None if gathered.loads is None else model.balance(number, gathered.loads)
            model.average(number)
        return RoundOutcome(
            number=number,
            nodes=len(nodes),
            asked=len(requests.asked),
            bytes_down=bytes_down,
            replies=gathered.replies,
            changed=delta is not None,
            unchanged_tensors=0 if delta is None else len(model.tensors) - len(delta),
            loads=loads,
        )

    def _checker(self) -> ReplyChecker:
        """Return what compares this round's replies with what was asked. At node level no delta is too long."""
        bounded = self._books.node_level is None
        return ReplyChecker(self._terms.plan, self._books.receipts, bounded=bounded, noise_test=self._model.noise_test)

    def _scales(self, holders: Mapping[str, int], nodes: Nodes) -> dict[str, float]:
        """Return wire name → factor on the step of what fewer nodes returned than could be expected."""
        federation = self._terms.federation
        if federation.step_scale != "contributions":
            return {}
        capacities = [node.expert_capacity for node in nodes.values()]
        return step_scales(expected_holders(federation, self._terms.plan.model.experts.routed, capacities), holders)

    def _evaluate_on_nodes(self, number: int, nodes: Nodes) -> PrivateEvaluation | None:
        """Let nodes measure what is published on units that they hold out, where that is due."""
        terms, books = self._terms, self._books
        requests = ask_to_evaluate(terms, books, nodes, self._model.published, number)
        if not requests.asked:
            return None
        replies = self._grid.send_and_receive(requests.messages(), timeout=terms.federation.reply_timeout_s)
        outcome = collect(terms.plan, requests.asked, replies, books.receipts)
        books.receipts.save()
        return outcome

    def _evaluate_on_public(self) -> Evaluation | None:
        """Measure what is published on public records, where there are any."""
        if self._public_test is None:
            return None
        return evaluate(self._terms.plan.model, self._model.published, self._public_test)
