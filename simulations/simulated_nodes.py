"""Simulated nodes: one partition of an embedded data set each, with seeded identity and randomness."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from conclave.clients.node import Node
from conclave.clients.node_ledger import HeldOut
from conclave.clients.policy import Policy
from conclave.data.config import taking_part
from conclave.data.held_out import sides_of
from conclave.data.partition import partition
from conclave.data.sources import GROUP, DataSet, declared_size, load
from conclave.model.records import Records
from conclave.privacy.ledger import Genesis, Ledger
from conclave.privacy.ledger.genesis import Side
from conclave.privacy.ledger.heads import public_hex
from conclave.privacy.randomness import derive
from conclave.protocol.messages import ProtocolError
from conclave.server.scenario import Scenario, parse_scenario


def ledger_path(run_dir: Path, node: int) -> Path:
    """Where the ledger of simulated node number ``node`` lies."""
    return run_dir / "ledgers" / f"node-{node:04d}.db"


def held_out_ledger_path(run_dir: Path, node: int) -> Path:
    """Where the ledger of a simulated node's held-out units lies."""
    return run_dir / "held-out" / f"node-{node:04d}.db"


@lru_cache(maxsize=1024)
def open_simulated(scenario_toml: str, run_dir: str, number: int, of: int) -> Node:
    """Open simulated node ``number`` of ``of`` of a scenario, creating its ledger on first use.

    Its identity, secrets and records follow from the scenario's seed, so a run can be repeated exactly. The
    ledger is a simulation ledger and says so.

    Raises:
        ProtocolError: ``schema-mismatch``, the scenario deals its records to another number of nodes.
    """
    scenario, dataset, shares = deal(scenario_toml)
    if of != len(shares):
        raise ProtocolError("schema-mismatch", f"{of} simulated nodes, must be the scenario's {len(shares)}")
    index = torch.from_numpy(shares[number])
    number = taking_part(scenario.partition)[number]
    root = derive(scenario.seed.to_bytes(32, "big"), "simulated node", number)
    # Groups decide who holds what. No model sees them, and where they are not the unit, no node.
    grouped = scenario.privacy.unit == "group"
    records: Records = {name: tensor[index] for name, tensor in dataset.train.items() if grouped or name != GROUP}
    units = len(index)
    if grouped:
        if GROUP not in records:
            raise ProtocolError("schema-mismatch", "the records have no groups")
        units = len(records[GROUP].unique())
    ledger = _open_ledger(scenario, ledger_path(Path(run_dir), number), root, number, "training")
    size, held_out = declared_size(units), None
    if scenario.evaluation is not None:
        path = held_out_ledger_path(Path(run_dir), number)
        records, aside = sides_of(records, ledger.genesis, None)
        held_out = HeldOut(aside, _open_ledger(scenario, path, root, number, "held-out"))
        size = max(1, round(size * (1.0 - scenario.evaluation.held_out)))
    return Node(
        records=records,
        schema=dataset.schema,
        declared_size=size,
        policy=_policy(scenario, number),
        ledger=ledger,
        new_secret=lambda charge_id: derive(root, "charge", charge_id),
        held_out=held_out,
    )


def _policy(scenario: Scenario, number: int) -> Policy:
    """Allow everything; hold as many experts as the scenario gives its nodes in turn, or as many as there are."""
    everything = {"delta": 1.0, "loads": 1.0, "choice": 1.0, "metrics": 1.0}
    policy = Policy(simulation=True, max_records_per_unit=1_000_000, releases=everything)
    capacities = scenario.federation.capacities
    if not capacities:
        return policy
    return policy.model_copy(update={"expert_capacity": capacities[number % len(capacities)]})


def _open_ledger(scenario: Scenario, path: Path, root: bytes, number: int, side: Side) -> Ledger:
    key = Ed25519PrivateKey.from_private_bytes(derive(root, "ledger key" if side == "training" else "held-out key"))
    if path.exists():
        return Ledger(path, key)
    return Ledger.create(path, _genesis(scenario, root, number, key, side), key)


@lru_cache(maxsize=4)
def deal(scenario_toml: str) -> tuple[Scenario, DataSet, list[np.ndarray]]:
    """Load a scenario's data and deal it: the scenario, the data set, and record indices of each node that takes part.

    Raises:
        BadInputError: the records cannot be dealt as the scenario asks.
    """
    scenario = parse_scenario(scenario_toml, where="scenario")
    dataset = load(scenario.data)
    shares = partition(dataset.train, scenario.partition, scenario.seed)
    return scenario, dataset, [shares[number] for number in taking_part(scenario.partition)]


def _genesis(scenario: Scenario, root: bytes, number: int, key: Ed25519PrivateKey, side: Side) -> Genesis:
    evaluation, epsilon = scenario.evaluation, scenario.privacy.epsilon
    if side == "held-out" and evaluation is not None and evaluation.epsilon is not None:
        epsilon = evaluation.epsilon
    return Genesis.new(
        public_key=public_hex(key),
        dataset_id=f"{scenario.data.source}/node-{number}",
        split_key=derive(root, "split").hex(),
        unit=scenario.privacy.unit,
        epsilon=epsilon,
        delta=scenario.privacy.delta,
        mode="simulation",
        machine_id="simulation",
        held_out=0.0 if evaluation is None else evaluation.held_out,
        side=side,
    )
