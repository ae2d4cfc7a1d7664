"""What the data owner allows. The server may ask for less, never for more."""

from __future__ import annotations

from pydantic import Field

from clients.protocol import Plan, ProtocolError
from model.config import Frozen


class Policy(Frozen):
    """Bounds on what a plan may ask. The budget is not among them: the ledger's genesis fixes it.

    simulation: this node holds no private data. Only then are training without privacy and seeded randomness
        allowed. The owner's side decides it, never a message.
    """

    simulation: bool = False
    min_noise_multiplier: float = Field(default=0.3, ge=0.0)
    max_rounds: int = Field(default=10_000, ge=1)
    max_steps: int = Field(default=10_000, ge=1)
    max_parameters: int = Field(default=500_000_000, ge=1)
    expert_capacity: int = Field(default=4096, ge=1)
    certified_only: bool = True
    releases: tuple[str, ...] = ("delta",)

    def admit(self, plan: Plan) -> None:
        """Check a plan against the policy, before anything is charged.

        Raises:
            ProtocolError: ``not-allowed``; the detail says why, for the node's log only.
        """
        private = plan.privacy.mechanism != "none"
        if private == (plan.noise_multiplier is None):
            raise ProtocolError("bad-request", "the plan's mechanism and noise multiplier contradict each other")
        if not self.simulation:
            if plan.noise_multiplier is None or plan.noise_multiplier < self.min_noise_multiplier:
                raise ProtocolError("not-allowed", f"noise is below {self.min_noise_multiplier}")
            if self.certified_only and plan.privacy.gradients == "ghost" and plan.privacy.numeric != "strict":
                raise ProtocolError("not-allowed", "this gradient mode has no certified clip bound")
        for name, value, most in (
            ("rounds", plan.rounds, self.max_rounds),
            ("steps", plan.training.steps, self.max_steps),
        ):
            if value > most:
                raise ProtocolError("not-allowed", f"{name} is {value}, must be at most {most}")
        if "delta" not in self.releases:
            raise ProtocolError("not-allowed", "model deltas may not be released")
