"""The global model, and what is remembered beside it from round to round: all that a checkpoint holds."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from conclave.model import parameters
from conclave.model.building import build
from conclave.protocol.plan import Plan
from conclave.server.aggregate.averaging import ModelAverage
from conclave.server.aggregate.balancing import BIAS, Balancer, Loads
from conclave.server.aggregate.optimizer import ServerOptimizer
from conclave.server.replies.noise_likeness import NoiseTest
from conclave.server.rounds.checkpoint import Checkpoint
from conclave.server.rounds.terms import Terms


def initial_tensors(plan: Plan, seed: int) -> dict[str, Tensor]:
    """Return the global model to begin with. Experts that stay on nodes are silent in it: nobody trains these."""
    network = build(plan.model, seed)
    wire = parameters.split(network.state_dict(), network.held)
    return {name: torch.zeros_like(tensor) if plan.stays(name) else tensor for name, tensor in wire.items()}


class ModelState:
    """The global tensors, the server optimizer's memory of each, the average over rounds, the history of the noise.

    noise_test: what drops replies that are not like their noise, and learns from those that are; None for no test.
    """

    def __init__(self, terms: Terms, tensors: Mapping[str, Tensor]) -> None:
        """Begin with ``tensors``, all of the model: wire name → float32, copied."""
        federation = terms.federation
        self.noise_test = None if federation.noise_test is None else NoiseTest(terms.plan, federation.noise_test)
        self._terms = terms
        self._optimizer = ServerOptimizer(federation.optimizer, tensors)
        self._average = ModelAverage(federation.average, federation.rounds)

    @property
    def tensors(self) -> dict[str, Tensor]:
        """What nodes go on from: wire name → float32, detached. They share memory with the model and follow it."""
        return self._optimizer.snapshot()

    @property
    def published(self) -> Mapping[str, Tensor]:
        """What is evaluated and published: the average over rounds where there is one, else :attr:`tensors`."""
        return self._average.of(self.tensors)

    def step(self, number: int, delta: Mapping[str, Tensor], scales: Mapping[str, float]) -> None:
        """Move the model along a round's aggregated delta, by the round's learning rate.

        Args:
            delta: wire name → pseudo-gradient; what is missing keeps its value and the optimizer's memory of it.
            scales: wire name → factor on the rate, 1 where missing.
        """
        # A selection bias is the server's to move: what a node sends for it is 0, or not honest.
        delta = {name: tensor for name, tensor in delta.items() if not name.endswith(f"/{BIAS}")}
        rate = self._terms.federation.optimizer.rate(number, self._terms.plan.rounds)
        self._optimizer.step(delta, rate, scales)

    def balance(self, number: int, loads: Balancer) -> Loads:
        """Move the selection biases against a round's loads, and return these."""
        loads.move(self.tensors, number)
        return loads.relative_loads()

    def average(self, number: int) -> None:
        """Take the model as it is after a round that changed it into the average."""
        self._average.add(number, self.tensors)

    def checkpoint(self, number: int) -> Checkpoint:
        """Return where the run stands after a round; it shares the tensors' memory."""
        return Checkpoint(
            round=number,
            run_id=self._terms.run_id,
            plan_hash=self._terms.plan.hash,
            tensors=self.tensors,
            optimizer=self._optimizer.state(),
            history={} if self.noise_test is None else self.noise_test.history,
            average=self._average.tensors,
            averaged=self._average.count,
        )

    def restore(self, checkpoint: Checkpoint) -> None:
        """Put a checkpoint of this run back.

        Raises:
            BadInputError: it is of another model, of another optimizer or of a run that averages otherwise.
        """
        self._optimizer.restore(checkpoint.tensors, checkpoint.optimizer)
        if self.noise_test is not None:
            self.noise_test.restore(checkpoint.history)
        self._average.restore(checkpoint.averaged, checkpoint.average, checkpoint.tensors)
