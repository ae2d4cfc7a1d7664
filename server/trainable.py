"""Whether a scenario's model can be trained as the scenario asks, decided before any node is asked or charged."""

from __future__ import annotations

from conclave.model.experts.config import HeldExperts
from conclave.privacy.gradients.physical_batch import MEMORY_BYTES
from conclave.privacy.training.rehearsal import rehearse, tried_mechanism
from conclave.server.scenario import Scenario


def check_trainable(scenario: Scenario) -> None:
    """Train a scenario's model on made-up records, with all experts and with a node's part of them.

    What a node would refuse because of the model is refused here, before any node is asked.

    Raises:
        BadInputError: the model cannot be built, or cannot be trained as the scenario asks.
    """
    plan = scenario.plan()
    mechanism = tried_mechanism(plan.privacy, plan.noise_multiplier, plan.load_share)
    every = plan.model.all_experts
    part: HeldExperts = {layer: ids[: scenario.federation.experts_per_node] for layer, ids in every.items()}
    for held in (every, part) if plan.model.source is not None else (part,):
        rehearse(plan.model, mechanism, held).check_fits(MEMORY_BYTES)  # more than that no node takes
