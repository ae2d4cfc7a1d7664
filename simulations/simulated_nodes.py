"""Simulated nodes: one partition of an embedded data set each, with seeded identity and randomness."""

from __future__ import annotations

import tomllib
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from pydantic import ConfigDict, Field

from conclave.base.frozen import Frozen
from conclave.clients.held_out import HeldOut, sides_of
from conclave.clients.node import Node
from conclave.clients.policy import Policy
from conclave.data.config import DataConfig, PartitionConfig, taking_part
from conclave.data.partition import partition
from conclave.data.sources import GROUP, DataSet, declared_size, load
from conclave.model.records import Records
from conclave.privacy.ledger import Genesis, Ledger
from conclave.privacy.ledger.entry import Side
from conclave.privacy.ledger.heads import public_hex
from conclave.privacy.randomness import derive
from conclave.privacy.releases.evaluation_config import EvaluationConfig
from conclave.privacy.training.config import PrivacyConfig
from conclave.protocol.messages import ProtocolError


class SimulatedCapacities(Frozen):
    """How many experts of a layer simulated nodes can hold, in turn; without any, as many as there are."""

    model_config = ConfigDict(frozen=True, extra="ignore")

    capacities: tuple[int, ...] = Field(default=(), strict=False)

    def policy_of(self, number: int) -> Policy:
        """Return the policy of simulated node ``number``."""
        everything = {"delta": 1.0, "loads": 1.0, "choice": 1.0, "metrics": 1.0}
        policy = Policy(simulation=True, max_records_per_unit=1_000_000, releases=everything)
        if not self.capacities:
            return policy
        return policy.model_copy(update={"expert_capacity": self.capacities[number % len(self.capacities)]})


class SimulatedData(Frozen):
    """The sections of a scenario that a simulated node reads; the others are the server's business."""

    model_config = ConfigDict(frozen=True, extra="ignore")

    seed: int
    data: DataConfig
    partition: PartitionConfig
    privacy: PrivacyConfig
    federation: SimulatedCapacities
    evaluation: EvaluationConfig | None = None


def ledger_path(run_dir: Path, node: int) -> Path:
    """Where the ledger of simulated node number ``node`` lies."""
    return run_dir / "ledgers" / f"node-{node:04d}.db"


def held_out_ledger_path(run_dir: Path, node: int) -> Path:
    """Where the ledger of a simulated node's held-out units lies."""
    return run_dir / "held-out" / f"node-{node:04d}.db"


@lru_cache(maxsize=1024)
def open_simulated(scenario_toml: str, run_dir: str, number: int, of: int) -> Node:
    """Open the simulated node in place ``number`` of ``of`` of a scenario, creating its ledger on first use.

    Its identity, secrets and records follow from the scenario's seed, so a run can be repeated exactly. The
    ledger is a simulation ledger and says so.

    Raises:
        ProtocolError: ``schema-mismatch``, the scenario deals its records to another number of nodes.
    """
    sections, dataset, shares = deal(scenario_toml)
    if of != len(shares):
        raise ProtocolError("schema-mismatch", f"{of} simulated nodes, must be the scenario's {len(shares)}")
    index = torch.from_numpy(shares[number])
    number = taking_part(sections.partition)[number]
    root = derive(sections.seed.to_bytes(32, "big"), "simulated node", number)
    # Groups decide who holds what. No model sees them, and where they are not the unit, no node.
    grouped = sections.privacy.unit == "group"
    records: Records = {name: tensor[index] for name, tensor in dataset.train.items() if grouped or name != GROUP}
    units = len(index)
    if grouped:
        if GROUP not in records:
            raise ProtocolError("schema-mismatch", "the records have no groups")
        units = len(records[GROUP].unique())
    ledger = _open_ledger(sections, ledger_path(Path(run_dir), number), root, number, "training")
    size, held_out = declared_size(units), None
    if sections.evaluation is not None:
        path = held_out_ledger_path(Path(run_dir), number)
        records, aside = sides_of(records, ledger.genesis, None)
        held_out = HeldOut(aside, _open_ledger(sections, path, root, number, "held-out"))
        size = max(1, round(size * (1.0 - sections.evaluation.held_out)))
    return Node(
        records=records,
        schema=dataset.schema,
        declared_size=size,
        policy=sections.federation.policy_of(number),
        ledger=ledger,
        new_secret=lambda charge_id: derive(root, "charge", charge_id),
        held_out=held_out,
    )


def _open_ledger(sections: SimulatedData, path: Path, root: bytes, number: int, side: Side) -> Ledger:
    key = Ed25519PrivateKey.from_private_bytes(derive(root, "ledger key" if side == "training" else "held-out key"))
    if path.exists():
        return Ledger(path, key)
    return Ledger.create(path, _genesis(sections, root, number, key, side), key)


@lru_cache(maxsize=4)
def deal(scenario_toml: str) -> tuple[SimulatedData, DataSet, list[np.ndarray]]:
    """Load a scenario's data and deal it: its sections, the data set, and record indices of each node that takes part.

    Raises:
        BadInputError: the records cannot be dealt as the scenario asks.
    """
    sections = SimulatedData.model_validate(tomllib.loads(scenario_toml))
    dataset = load(sections.data)
    shares = partition(dataset.train, sections.partition, sections.seed)
    return sections, dataset, [shares[number] for number in taking_part(sections.partition)]


def _genesis(sections: SimulatedData, root: bytes, number: int, key: Ed25519PrivateKey, side: Side) -> Genesis:
    evaluation, epsilon = sections.evaluation, sections.privacy.epsilon
    if side == "held-out" and evaluation is not None and evaluation.epsilon is not None:
        epsilon = evaluation.epsilon
    return Genesis.new(
        public_key=public_hex(key),
        dataset_id=f"{sections.data.source}/node-{number}",
        split_key=derive(root, "split").hex(),
        unit=sections.privacy.unit,
        epsilon=epsilon,
        delta=sections.privacy.delta,
        mode="simulation",
        machine_id="simulation",
        held_out=0.0 if evaluation is None else evaluation.held_out,
        side=side,
    )
