"""Deal a data set's training records to simulated nodes, with Flower's partitioners."""

from __future__ import annotations

import warnings
from collections.abc import Mapping

import numpy as np
from datasets import Dataset
from flwr_datasets.partitioner import DirichletPartitioner, IidPartitioner, Partitioner, PathologicalPartitioner
from torch import Tensor

from conclave.base.errors import BadInputError
from conclave.data.config import (
    DirichletPartition,
    GroupsPartition,
    IidPartition,
    PartitionConfig,
    PathologicalPartition,
)

_ByLabel = IidPartition | DirichletPartition | PathologicalPartition


def partition(records: Mapping[str, Tensor], config: PartitionConfig, seed: int) -> list[np.ndarray]:
    """Return the record indices of each node: disjoint, together all records, the same for the same seed.

    Args:
        records: ``label`` int [records] for schemes by label, ``group`` int [records] for whole groups.
        config: how to deal them.
        seed: fixes the shares; ``groups`` needs none.

    Raises:
        BadInputError: the records cannot be dealt that way.
    """
    count = len(next(iter(records.values())))
    if config.nodes > count:
        raise BadInputError(f"partition.nodes is {config.nodes}, must be at most the {count} training records")
    needed = {"groups": "group", "iid": None}.get(config.scheme, "label")
    if needed is not None and needed not in records:
        raise BadInputError(f"partition.scheme is {config.scheme}, must be another: these records have no {needed}s")
    if isinstance(config, GroupsPartition):
        return _whole_groups(records["group"].numpy(), config.nodes)
    labels = records["label"].numpy() if "label" in records else np.zeros(count, dtype=np.int64)
    return _by_flower(labels, config, seed)


def _whole_groups(groups: np.ndarray, nodes: int) -> list[np.ndarray]:
    """Give each group, the largest first, to the node that has the fewest records so far."""
    numbers, sizes = np.unique(groups, return_counts=True)
    if nodes > len(numbers):
        raise BadInputError(f"partition.nodes is {nodes}, must be at most the {len(numbers)} groups of records")
    shares: list[list[int]] = [[] for _ in range(nodes)]
    load = np.zeros(nodes, dtype=np.int64)
    for position in np.argsort(-sizes, kind="stable"):
        node = int(load.argmin())
        shares[node].append(int(numbers[position]))
        load[node] += sizes[position]
    return [np.flatnonzero(np.isin(groups, share)) for share in shares]


def _by_flower(labels: np.ndarray, config: _ByLabel, seed: int) -> list[np.ndarray]:
    # Flower's IID partitioner cuts the set in order and takes no seed: shuffle first, for every scheme.
    order = np.random.default_rng(seed).permutation(len(labels))
    partitioner = _partitioner(config, seed)
    partitioner.dataset = Dataset.from_dict({"label": labels[order].tolist(), "record": order.tolist()})
    try:
        with warnings.catch_warnings():  # the Dirichlet partitioner warns at each of its own retries
            warnings.simplefilter("ignore", UserWarning)
            shares = [
                np.sort(np.asarray(partitioner.load_partition(node)["record"], dtype=np.int64))
                for node in range(config.nodes)
            ]
    except ValueError as error:
        raise BadInputError(
            f"partition: {config.scheme} cannot deal {len(labels)} records to {config.nodes} nodes "
            "with these settings; use fewer nodes or a milder skew"
        ) from error
    dealt = sum(map(len, shares))
    if dealt != len(labels):
        raise BadInputError(
            f"partition: {config.scheme} on {config.nodes} nodes would leave {len(labels) - dealt} of {len(labels)} "
            "records to nobody, there must be at least one node for every label"
        )
    return shares


def _partitioner(config: _ByLabel, seed: int) -> Partitioner:
    if isinstance(config, IidPartition):
        return IidPartitioner(num_partitions=config.nodes)
    if isinstance(config, DirichletPartition):
        return DirichletPartitioner(
            num_partitions=config.nodes,
            partition_by="label",
            alpha=config.alpha,
            min_partition_size=config.min_records,
            self_balancing=False,
            seed=seed,
        )
    return PathologicalPartitioner(
        num_partitions=config.nodes,
        partition_by="label",
        num_classes_per_partition=config.labels_per_node,
        class_assignment_mode="first-deterministic",  # node i sees label i first, so no label is forgotten
        seed=seed,
    )
