"""Configuration of a scenario's data set and of how a simulation deals it to nodes."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from model.config import Frozen


class DataConfig(Frozen):
    """The data set. ``test_records`` are held out, public, and used by the server for evaluation.

    ``mnist`` needs the original files in the folder that the environment variable ``CONCLAVE_DATA`` names.
    ``window`` is the bytes in one record of text; images have none.
    """

    source: Literal["digits", "mnist", "stdlib-text"]
    test_records: int = Field(default=360, ge=1)
    window: int = Field(default=64, ge=2, le=65_536)


class IidPartition(Frozen):
    """Equal shares, drawn at random."""

    scheme: Literal["iid"]
    nodes: int = Field(ge=1, le=1_000_000)


class DirichletPartition(Frozen):
    """Label proportions drawn from Dirichlet(alpha): the smaller alpha, the more the nodes differ."""

    scheme: Literal["dirichlet"]
    nodes: int = Field(ge=1, le=1_000_000)
    alpha: float = Field(gt=0.0, le=1e6)
    min_records: int = Field(default=10, ge=1)


class PathologicalPartition(Frozen):
    """Every node sees ``labels_per_node`` labels only."""

    scheme: Literal["pathological"]
    nodes: int = Field(ge=1, le=1_000_000)
    labels_per_node: int = Field(ge=1)


class GroupsPartition(Frozen):
    """Whole groups of records (for text: packages), dealt so that the nodes' sizes come out alike."""

    scheme: Literal["groups"]
    nodes: int = Field(ge=1, le=1_000_000)


PartitionConfig = Annotated[
    IidPartition | DirichletPartition | PathologicalPartition | GroupsPartition, Field(discriminator="scheme")
]
