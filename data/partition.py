"""Deal a data set's training records to simulated nodes, with Flower's partitioners."""

from __future__ import annotations

import warnings

import numpy as np
from datasets import Dataset
from flwr_datasets.partitioner import (
    DirichletPartitioner,
    IidPartitioner,
    Partitioner,
    PathologicalPartitioner,
)

from data.config import DirichletPartition, IidPartition, PartitionConfig
from model.errors import BadInputError


def partition(labels: np.ndarray, config: PartitionConfig, seed: int) -> list[np.ndarray]:
    """Return the record indices of each node: disjoint, together all records, the same for the same seed.

    Args:
        labels: int [records].

    Raises:
        BadInputError: the records cannot be dealt that way.
    """
    if config.nodes > len(labels):
        raise BadInputError(f"partition.nodes is {config.nodes}, must be at most the {len(labels)} training records")
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


def _partitioner(config: PartitionConfig, seed: int) -> Partitioner:
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
