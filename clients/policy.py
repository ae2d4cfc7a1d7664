"""What the data owner allows. The server may ask for less, never for more."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from conclave.base.frozen import Frozen
from conclave.clients.capacity import experts_that_fit, experts_within, process_memory
from conclave.model.config import ModelConfig
from conclave.model.experts.config import HeldExperts
from conclave.model.parameters import shapes
from conclave.protocol.charges import METRICS, release_costs
from conclave.protocol.messages import ProtocolError
from conclave.protocol.plan import Plan

Share = Annotated[float, Field(ge=0.0, le=1.0)]


class Policy(Frozen):
    """Bounds on what a plan may ask. The budget is not among them: the ledger's genesis fixes it.

    simulation: this node holds no private data. Only then are training without privacy and seeded randomness
        allowed. The owner's side decides it, never a message.
    max_steps: local steps of one round. max_rounds: rounds of one plan.
    max_records_per_unit: where groups are the unit, records of a group that take part. It bounds a unit's share of the
        work; its memory is bounded anyway.
    max_parameters: of the part of a model that comes here. A plan is refused if even the smallest part has more.
    expert_capacity: experts of one layer that this node can hold.
    memory_mb: MiB that training may take, besides program and records; it also limits the experts, see
        :mod:`conclave.clients.capacity`. Of a model of the user's own, which would have to be imported, only once it is
        allowed.
    certified_only: refuse gradient modes without a certified clip bound.
    releases: what may leave, each with the largest share of a plan's budget it may take: ``delta``, and ``loads``, the
        histogram of expert loads, which nobody gets unless the owner names it. So must ``metrics`` be named, of
        held-out units, which a budget of their own pays for: with any share above 0.
    scenarios: the only ones allowed, by name, or by ``plan:`` and the hash of a plan; if not given, any. A name
        is only the server's word; a plan's hash is binding.
    unapproved_plans: run plans that the owner has not approved (``conclave node approve``). Only a deployed node asks.
    models: each ``module:function`` that this node may import and run for a plan with a model of its own; none unless
        the owner names it. In a simulation, whoever wrote the scenario runs it.
    """

    simulation: bool = False
    min_noise_multiplier: float = Field(default=0.3, ge=0.0)
    max_rounds: int = Field(default=10_000, ge=1)
    max_steps: int = Field(default=10_000, ge=1)
    max_records_per_unit: int = Field(default=10_000, ge=1)
    max_parameters: int = Field(default=500_000_000, ge=1)
    expert_capacity: int = Field(default=4096, ge=1)
    memory_mb: int | None = Field(default=None, ge=1, le=2**30)
    certified_only: bool = True
    releases: dict[str, Share] = Field(default_factory=lambda: {"delta": 1.0})
    scenarios: tuple[str, ...] | None = None
    unapproved_plans: bool = False
    models: tuple[str, ...] = ()

    def capacity(self, model: ModelConfig) -> int:
        """Return how many experts of each layer of a model this node can hold, perhaps none."""
        unknown = model.source is not None and not self.simulation and model.source not in self.models
        if unknown:
            return self.expert_capacity
        fits = [self.expert_capacity]
        if self.memory_mb is not None:
            fits.append(experts_that_fit(model, self.memory_mb))
        process = process_memory()
        if process is not None:
            fits.append(experts_within(model, process.model_bytes))
        return min(fits)

    def check(self, plan: Plan, scenario: str, order: float) -> None:
        """Check a plan against the policy, before anything is charged.

        Args:
            order: the RDP order of the ledger that pays for training.

        Raises:
            ProtocolError: ``not-allowed``; the detail says why, for the node's log only.
        """
        private = plan.privacy.mechanism != "none"
        if private == (plan.noise_multiplier is None):
            raise ProtocolError("bad-request", "the plan's mechanism and noise multiplier contradict each other")
        if self.scenarios is not None and not {scenario, f"plan:{plan.hash}"} & set(self.scenarios):
            raise ProtocolError("not-allowed", f"scenario {scenario!r} is not among those that policy.scenarios allows")
        if not self.simulation:
            if plan.model.source is not None and plan.model.source not in self.models:
                raise ProtocolError(
                    "not-allowed", f"{plan.model.source!r} is not among those that policy.models allows"
                )
            if plan.noise_multiplier is None or plan.noise_multiplier < self.min_noise_multiplier:
                noise = "none" if plan.noise_multiplier is None else f"{plan.noise_multiplier:g}"
                raise ProtocolError("not-allowed", f"noise is {noise}, must be at least {self.min_noise_multiplier:g}")
            if self.certified_only and plan.privacy.gradients == "ghost" and plan.privacy.numeric != "strict":
                raise ProtocolError("not-allowed", "this gradient mode has no certified clip bound")
        for name, value, most in (
            ("rounds", plan.rounds, self.max_rounds),
            ("steps", plan.training.steps, self.max_steps),
            ("records_per_unit", plan.privacy.records_per_unit or 1, self.max_records_per_unit),
        ):
            if value > most:
                raise ProtocolError("not-allowed", f"{name} is {value}, must be at most {most}")
        if plan.model.source is None:  # else its code would run, before the owner has approved the plan
            self.check_size(plan)
        for name, share in release_costs(plan, order).items():
            allowed = self.releases.get(name, 0.0)
            if share > allowed:
                raise ProtocolError(
                    "not-allowed", f"{name} takes {share:g} of the budget, policy.releases allows {allowed:g}"
                )

    def check_size(self, plan: Plan) -> None:
        """Check that some part of a plan's model is small enough.

        Raises:
            BadInputError: the user's own model cannot be built.
            ProtocolError: as :meth:`check`.
        """
        least = {layer: tuple(range(plan.model.experts.top_k)) for layer in range(plan.model.layers)}
        smallest = sum(shape.numel() for shape in shapes(plan.model, least).values())
        if smallest > self.max_parameters:  # whatever part the server would send
            raise ProtocolError(
                "not-allowed",
                f"{smallest} parameters with as few experts as a token needs, must be at most {self.max_parameters}",
            )

    @property
    def evaluates(self) -> bool:
        """Whether the owner lets out what is measured on held-out units."""
        return self.releases.get(METRICS, 0.0) > 0.0

    def check_evaluation(self, plan: Plan) -> None:
        """Check what a plan asks of held-out units, before anything is charged.

        Raises:
            ProtocolError: as :meth:`check`.
        """
        if plan.evaluation is None:
            raise ProtocolError("bad-request", "the plan has no evaluation")
        if not self.evaluates:
            raise ProtocolError("not-allowed", f"policy.releases does not name {METRICS}")
        noise = plan.evaluation.noise_multiplier
        if not self.simulation and (noise is None or noise < self.min_noise_multiplier):
            raise ProtocolError("not-allowed", "the noise of metrics is below policy.min_noise_multiplier")


def check_held(held: HeldExperts, plan: Plan, capacity: int) -> None:
    """Check an assignment: every layer, ascending known ids, enough for top_k, within capacity.

    Raises:
        ProtocolError: ``bad-request``, or ``not-allowed`` for too many experts.
    """
    experts = plan.model.experts
    if sorted(held) != list(range(plan.model.layers)):
        raise ProtocolError("bad-request", "the assignment must name every layer once")
    for ids in held.values():
        if list(ids) != sorted(set(ids)) or not all(0 <= e < experts.routed for e in ids):
            raise ProtocolError("bad-request", "expert ids must be ascending and exist")
        if len(ids) < experts.top_k:
            raise ProtocolError("bad-request", f"{len(ids)} experts, must be at least top_k {experts.top_k}")
        if len(ids) > capacity:
            raise ProtocolError("not-allowed", f"{len(ids)} experts, must be at most {capacity}")
