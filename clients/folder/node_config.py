"""``node.toml``: what the owner of a node decided, read at every start."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Literal, Self

from pydantic import Field, ValidationError, model_validator

from conclave.base.errors import BadInputError
from conclave.base.explain import explain
from conclave.base.frozen import Frozen
from conclave.base.toml_file import read_toml
from conclave.clients.folder.server_address import ServerAddress
from conclave.clients.folder.toml_line import toml_line
from conclave.clients.operations_config import LimitsConfig, MonitoringConfig
from conclave.clients.policy import Policy
from conclave.data.formats.config import FormatConfig


class DatasetConfig(Frozen):
    """The private data. ``declared_size`` is public: how many units the node says it has.

    id: the owner's name for the data; it has one ledger and one budget.
    unit: whose participation is protected: each ``record``, or all records of a ``group``.
    held_out: the share of units that never train, so that models can be measured on them. They have their own ledger,
        with the same budget: a unit is on one side only, so (ε, δ) holds for every unit.
    """

    id: str = Field(min_length=1, max_length=200)
    data: Path
    unit: Literal["record", "group"] = "record"
    declared_size: int = Field(ge=1)
    held_out: float = Field(default=0.0, ge=0.0, le=0.9)


class BudgetConfig(Frozen):
    """(ε, δ) for everything that ever leaves. Fixed when the ledger is created; a later change is refused."""

    epsilon: float = Field(gt=0.0, le=1e6)
    delta: float = Field(gt=0.0, lt=1.0)


class StorageConfig(Frozen):
    """Where things lie; paths are relative to the folder of ``node.toml``.

    witness: a file that the ledger's last head is copied to; held-out units' has ``.held-out`` after its name. On
        another disk or machine than ``state``, or a restored backup cannot be told from the ledger itself.
    machine: replaces the operating system's machine id if that is missing or shared (containers).
    """

    state: Path = Path("state")
    witness: Path
    machine: str | None = Field(default=None, min_length=1, max_length=200)


class ConnectionConfig(Frozen):
    """The server that the node dials; paths are relative to the folder of ``node.toml``.

    address: host:port. ca: certificates of those who may have signed the server's.
    key: what the node proves itself with; its public half is enrolled at the server.
    internal_port: of Flower's SuperNode, on loopback only.
    """

    address: ServerAddress
    ca: Path
    key: Path = Path("state/node.key")
    internal_port: int = Field(default=9094, ge=1, le=65_535)


class NodeConfig(Frozen):
    """All of ``node.toml``.

    server: None if the node is not connected to one. format: how the data are laid out; needed to start.
    limits, monitoring: how the node runs on its machine.
    """

    dataset: DatasetConfig
    budget: BudgetConfig
    storage: StorageConfig
    policy: Policy = Policy()
    server: ConnectionConfig | None = None
    format: FormatConfig | None = None
    limits: LimitsConfig = LimitsConfig()
    monitoring: MonitoringConfig = MonitoringConfig()

    @model_validator(mode="after")
    def _is_no_simulation(self) -> Self:
        if self.policy.simulation:
            raise ValueError("policy.simulation is true, must not be set where there are private data")
        return self

    @model_validator(mode="after")
    def _has_a_port_for_each(self) -> Self:
        port = self.monitoring.metrics_port
        if self.server is not None and port == self.server.internal_port:
            raise ValueError(f"monitoring.metrics_port is {port}, must be another than server.internal_port")
        return self


def read_node_config(path: Path) -> NodeConfig:
    """Read ``node.toml``.

    Raises:
        BadInputError: one sentence that names the file, the key, the value and what is allowed.
    """
    return parse_node_config(read_toml(path, "a node's configuration"), where=str(path))


def parse_node_config(document: Mapping[str, object], *, where: str) -> NodeConfig:
    """Check a configuration; ``where`` names its origin in errors. Raises as :func:`read_node_config`."""
    # By way of JSON, where a string may be a path and a list a tuple; nothing else is converted.
    text = json.dumps(document, default=str, ensure_ascii=False)
    try:
        return NodeConfig.model_validate_json(text.encode())
    except UnicodeEncodeError as error:
        around = text[: error.start].rpartition('"')[2] + ascii(text[error.start])[1:-1]
        raise BadInputError(f"{where}: {around}… is no text in UTF-8, must be a name or path that is") from error
    except ValidationError as error:
        raise BadInputError(f"{where}: {explain(error, NodeConfig)}") from error


def default_text(
    dataset: DatasetConfig, budget: BudgetConfig, storage: StorageConfig, server: ConnectionConfig | None = None
) -> str:
    """Return a commented ``node.toml``: the given decisions, and the policy's defaults."""
    policy = Policy()
    machine = "" if storage.machine is None else toml_line("machine", storage.machine) + "\n"
    return f"""# What this node's owner allows. The server may ask for less, never for more.

[dataset]
# There is one ledger, and one budget, for this name.
{toml_line("id", dataset.id)}
{toml_line("data", str(dataset.data))}
# Whose participation is protected: each "record", or all records of a "group".
{toml_line("unit", dataset.unit)}
# Public: how many units this node says it has.
{toml_line("declared_size", dataset.declared_size)}
# Share of units that never train: models are measured on them. Fixed when the ledgers were created.
{toml_line("held_out", dataset.held_out)}

[budget]
# For everything that ever leaves. Fixed when the ledger was created.
{toml_line("epsilon", budget.epsilon)}
{toml_line("delta", budget.delta)}

[storage]
# Ledger and signing key, readable by their owner only. Paths are relative to this file.
{toml_line("state", str(storage.state))}
# Keeps the ledger's last head. Put it on another disk or machine: it finds a restored backup out.
{toml_line("witness", str(storage.witness))}
{machine}
[policy]
{toml_line("min_noise_multiplier", policy.min_noise_multiplier)}
{toml_line("max_rounds", policy.max_rounds)}
# Local steps of one round.
{toml_line("max_steps", policy.max_steps)}
# Records of one group that take part, where groups are the unit.
{toml_line("max_records_per_unit", policy.max_records_per_unit)}
{toml_line("max_parameters", policy.max_parameters)}
# Experts of one layer that fit into this machine.
{toml_line("expert_capacity", policy.expert_capacity)}
# MiB that training may take, beside program and records; from it follows how many experts of a given model fit.
# memory_mb = 4096
# Refuse gradient modes whose clip bound is not certified.
certified_only = true
# Only these scenarios: by name, or by the hash of a plan, which "conclave plan" prints.
# scenarios = ["digits", "plan:0123..."]
# Code that this node may import and run for a plan with a model of its own.
# models = ["package.module:function"]

# Run plans that "conclave node approve" has not let through.
# unapproved_plans = true

[policy.releases]
# What may leave, and the largest share of a plan's budget it may take.
delta = 1.0
# Noised histograms of expert loads, by which a server balances experts.
# loads = 0.05
# What is measured on held-out units, which have a ledger and a budget of their own.
# metrics = 1.0

# How the data are laid out; docs/data.md has every format.
# [format]
# kind = "csv"
# label = "outcome"
# labels = ["no", "yes"]

{_server_text(server)}
{LIMITS_TEXT}
{MONITORING_TEXT}"""


LIMITS_TEXT = """[limits]
# Threads of training; as many as there are cores if not given.
# threads = 4
# MiB that each of the node's two processes may allocate.
# memory_mb = 8192
# Local times between which the node works; outside of them it is paused.
# hours = "20:00-06:00"
"""

MONITORING_TEXT = """[monitoring]
# Lines of the log: "text", or "json", one object a line.
log_format = "text"
# Where /health and /metrics are, on loopback only; nowhere if not given.
# metrics_port = 9464
"""


def _server_text(server: ConnectionConfig | None) -> str:
    if server is None:
        return """# The server to dial.
# [server]
# address = "fed.example.org:9443"
# ca = "ca.pem"
"""
    return f"""# The server to dial.
[server]
{toml_line("address", server.address)}
{toml_line("ca", str(server.ca))}
{toml_line("key", str(server.key))}
# Of Flower's SuperNode, on loopback only.
{toml_line("internal_port", server.internal_port)}
"""
