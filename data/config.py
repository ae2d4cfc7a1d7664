"""Configuration of a scenario's data set and of how a simulation deals it to nodes."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from conclave.base.frozen import Frozen


class DataConfig(Frozen):
    """The data set. ``test_records`` are held out, public, and used by the server for evaluation.

    ``nodes``: there are no public records; every node has its own, in whatever format, and they must suit the model.
    Only ``[evaluation]`` tells how good the model is. Such a scenario is trained, not simulated.

    ``mnist`` needs the original files in the folder that the environment variable ``CONCLAVE_DATA`` names.
    ``window`` is the bytes in one record of text; images have none.
    """

    source: Literal["digits", "mnist", "stdlib-text", "nodes"]
    test_records: int = Field(default=360, ge=1)
    window: int = Field(default=64, ge=2, le=65_536)


class _Partition(Frozen):
    """What every scheme has: with ``only``, all other nodes are left out and their shares are not read."""

    younger = frozenset({"only"})
    only: int | None = Field(default=None, ge=0)

    @model_validator(mode="after")
    def _only_exists(self) -> _Partition:
        nodes: int = self.nodes  # type: ignore[attr-defined]  # each scheme has it, at its old place in the order of keys
        if self.only is not None and self.only >= nodes:
            raise ValueError(f"only is {self.only}, must be below the {nodes} nodes")
        return self


class IidPartition(_Partition):
    """Equal shares, drawn at random."""

    scheme: Literal["iid"]
    nodes: int = Field(ge=1, le=1_000_000)


class DirichletPartition(_Partition):
    """Label proportions drawn from Dirichlet(alpha): the smaller alpha, the more the nodes differ."""

    scheme: Literal["dirichlet"]
    nodes: int = Field(ge=1, le=1_000_000)
    alpha: float = Field(gt=0.0, le=1e6)
    min_records: int = Field(default=10, ge=1)


class PathologicalPartition(_Partition):
    """Every node sees ``labels_per_node`` labels only."""

    scheme: Literal["pathological"]
    nodes: int = Field(ge=1, le=1_000_000)
    labels_per_node: int = Field(ge=1)


class GroupsPartition(_Partition):
    """Whole groups of records (for text: packages), dealt so that the nodes' sizes come out about equal."""

    scheme: Literal["groups"]
    nodes: int = Field(ge=1, le=1_000_000)


PartitionConfig = Annotated[
    IidPartition | DirichletPartition | PathologicalPartition | GroupsPartition, Field(discriminator="scheme")
]


def taking_part(partition: PartitionConfig) -> range:
    """The numbers of the nodes that a simulation has: all, or the only one."""
    return range(partition.nodes) if partition.only is None else range(partition.only, partition.only + 1)
