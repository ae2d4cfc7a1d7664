"""What a scenario's model looks like and costs: what ``conclave model`` does."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from conclave.base.errors import BadInputError
from conclave.base.whole_file import write_atomically
from conclave.model.costs import ModelCosts, costs_of
from conclave.model.experts.config import HeldExperts
from conclave.server.assign.assignment import assign
from conclave.server.scenario import Scenario


@dataclass(frozen=True)
class ModelCard:
    """A scenario's model.

    held: layer → experts of each node in a round, for example: a run assigns by the nodes' fingerprints.
    bytes_down, bytes_up: one node, one round.
    """

    scenario: str
    preset: str
    layers: int
    routed: int
    shared: int
    top_k: int
    costs: ModelCosts
    bytes_down: int
    bytes_up: int
    bytes_full_model: int
    held: dict[str, HeldExperts]
    plot: str | None


def model_card(scenario: Scenario, plot: Path | None) -> ModelCard:
    """Describe a scenario's model, and draw an example of which node holds which experts in a round.

    Raises:
        BadInputError: the picture cannot be written, or the scenario cannot be carried out.
    """
    from conclave.report import charts
    from conclave.server.estimate import (
        exchange_bytes_of,  # with all of training, which the document itself needs not
    )
    from conclave.server.trainable import check_trainable

    check_trainable(scenario)
    model, federation = scenario.model, scenario.federation
    nodes = [f"node {number}" for number in range(scenario.nodes)]
    held = assign(
        federation.assignment,
        capacities=dict(zip(nodes, scenario.capacities, strict=True)),
        experts=model.experts.routed,
        per_node=federation.experts_per_node,
        layers=model.layers,
        seed=scenario.seed,
        round_number=1,
        min_holders=federation.min_holders,
    )
    down, up, full = exchange_bytes_of(scenario)
    if plot is not None:
        try:
            write_atomically(plot, charts.experts_held(held, model.experts.routed).encode())
        except OSError as error:
            raise BadInputError(f"--plot {plot}: cannot be written ({error.strerror})") from error
    return ModelCard(
        scenario=scenario.name,
        preset=model.preset,
        layers=model.layers,
        routed=model.experts.routed,
        shared=model.experts.shared,
        top_k=model.experts.top_k,
        costs=costs_of(model),
        bytes_down=down,
        bytes_up=up,
        bytes_full_model=full,
        held=held,
        plot=None if plot is None else str(plot),
    )
