"""The plan of a simulated scenario: the estimate, for the mean number of records that its partition gives a node."""

from __future__ import annotations

from clients.simulated import deal
from data.sources import records_if_absent
from server.plan_estimate import PlanEstimate, estimate
from server.scenario import Scenario

_ASSUMED = 1000
"""Units of a node whose records are its own."""


def plan(scenario: Scenario) -> PlanEstimate:
    """Work out what a scenario will cost on this machine, before anything runs.

    Raises:
        BadInputError: the scenario cannot be carried out.
    """
    if scenario.data.source == "nodes":
        return estimate(scenario, units_per_node=_ASSUMED)
    records = records_if_absent(scenario.data)
    if records is None:
        _, _, shares = deal(scenario.to_toml())
        records = sum(map(len, shares))
    return estimate(scenario, units_per_node=max(1, round(records / scenario.partition.nodes)))
