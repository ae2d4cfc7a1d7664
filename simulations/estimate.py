"""What a simulated scenario costs: the estimate, for the mean number of records that its partition gives a node."""

from __future__ import annotations

from conclave.data.sources import GROUP, records_if_absent
from conclave.privacy.accounting.sensible_budget import doubts
from conclave.server.estimate import PlanEstimate, estimate
from conclave.server.scenario import Scenario
from conclave.simulations.simulated_nodes import deal

_ASSUMED = 1000
"""Units of a node whose records are its own."""


def estimate_simulated(scenario: Scenario) -> PlanEstimate:
    """Work out what a scenario will cost on this machine, before anything runs.

    Raises:
        BadInputError: the scenario cannot be carried out.
    """
    if scenario.data.source == "nodes":
        return estimate(scenario, units_per_node=_ASSUMED)
    return estimate(scenario, units_per_node=max(1, round(_records(scenario) / scenario.partition.nodes)))


def budget_doubts(scenario: Scenario) -> list[str]:
    """Return one sentence for each reason why a simulated scenario's budget protects little.

    A simulation may have any budget. Real nodes have their own, which is checked when they are created.

    Raises:
        BadInputError: the scenario's data cannot be loaded.
    """
    privacy, nodes = scenario.privacy, scenario.partition.nodes
    if privacy.mechanism == "none" or scenario.data.source == "nodes":
        return []
    units = _records(scenario)
    if privacy.unit == "group" and records_if_absent(scenario.data) is None:
        _, dataset, shares = deal(scenario.to_toml())
        units = sum(len(dataset.train[GROUP][share].unique()) for share in shares)
    return doubts(privacy.epsilon, privacy.delta, max(1, round(units / nodes)))


def _records(scenario: Scenario) -> int:
    """Return how many records all nodes have together."""
    records = records_if_absent(scenario.data)
    if records is None:
        _, _, shares = deal(scenario.to_toml())
        records = sum(map(len, shares))
    return records
