"""A scenario: one TOML file that describes a whole federation. It composes every folder's configuration."""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import tomli_w
from pydantic import Field, ValidationError, model_validator

from clients.protocol import Plan, TrainingConfig
from data.config import DataConfig, PartitionConfig
from data.sources import schema_of
from model.config import Frozen, ModelConfig
from model.errors import BadInputError
from model.explain import explain, keys_of
from privacy.calibration import calibrate_noise
from privacy.config import PrivacyConfig
from server.config import FederationConfig

Overrides = Mapping[str, Any]


class Scenario(Frozen):
    """Everything about a federation except which machine simulates it.

    ``seed`` fixes partitions, initial weights, cohorts and assignments; in a simulation also sampling and noise.
    """

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$")
    description: str = ""
    seed: int = Field(default=1, ge=0, lt=2**63)
    model: ModelConfig
    data: DataConfig
    partition: PartitionConfig
    privacy: PrivacyConfig
    training: TrainingConfig
    federation: FederationConfig

    @model_validator(mode="after")
    def _fits_together(self) -> Scenario:
        experts, per_node = self.model.experts, self.federation.experts_per_node
        if per_node > experts.routed:
            raise ValueError(
                f"federation.experts_per_node is {per_node}, must be at most model.experts.routed {experts.routed}"
            )
        if experts.top_k > per_node:
            raise ValueError(
                f"model.experts.top_k is {experts.top_k}, must be at most federation.experts_per_node {per_node}"
            )
        if self.federation.assignment == "all" and per_node != experts.routed:
            raise ValueError(
                f"federation.experts_per_node is {per_node}, must be {experts.routed} with assignment 'all'"
            )
        if self.federation.min_replies > self.partition.nodes:
            raise ValueError(
                f"federation.min_replies is {self.federation.min_replies}, "
                f"must be at most partition.nodes {self.partition.nodes}"
            )
        mismatch = schema_of(self.data).mismatch(self.model)
        if mismatch is not None:
            raise ValueError(f"{mismatch} for data.source {self.data.source}")
        return self

    def plan(self) -> Plan:
        """Return what the run will ask of every node, with σ calibrated for taking part in every round.

        Raises:
            BadInputError: no noise multiplier satisfies (ε, δ).
        """
        noise = None
        if self.privacy.mechanism == "gaussian":
            noise = calibrate_noise(
                epsilon=self.privacy.epsilon,
                delta=self.privacy.delta,
                sampling_rate=self.privacy.sampling_rate,
                steps_per_charge=self.training.steps,
                charges=self.federation.rounds,
            )
        return Plan(
            model=self.model,
            privacy=self.privacy,
            training=self.training,
            rounds=self.federation.rounds,
            noise_multiplier=noise,
        )

    def to_toml(self) -> str:
        """Return the resolved scenario, every default written out."""
        return tomli_w.dumps(self.model_dump(mode="json", exclude_none=True))

    def toml_for_hash(self) -> str:
        """Return the same without younger keys that are at their defaults; see :class:`model.config.Frozen`."""
        return tomli_w.dumps(self.model_dump(mode="json", exclude_none=True, exclude=self.nothing_new()))


def read_scenario(path: Path, overrides: Overrides | None = None) -> Scenario:
    """Read a scenario file.

    Args:
        overrides: dotted key → value, put in place before validation.

    Raises:
        BadInputError: one sentence that names the file, the key, the value and what is allowed.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise BadInputError(f"{path}: cannot be read, must be a scenario file in TOML") from error
    return parse_scenario(text, where=str(path), overrides=overrides)


def parse_scenario(text: str, *, where: str, overrides: Overrides | None = None) -> Scenario:
    """Parse a scenario; ``where`` names its origin in errors. Raises as :func:`read_scenario`."""
    try:
        document = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise BadInputError(f"{where}: not TOML: {error}") from error
    except RecursionError as error:
        raise BadInputError(f"{where}: nested too deeply, must be a scenario in TOML") from error
    for key, value in (overrides or {}).items():
        _put(document, key, value)
    _drop_stale_options(document, overrides or {})
    try:
        return Scenario.model_validate(document)
    except ValidationError as error:
        raise BadInputError(f"{where}: {explain(error, Scenario)}") from error


def parse_override(text: str) -> tuple[str, Any]:
    """Split ``a.b=value``; the value is TOML, or a bare string.

    Raises:
        BadInputError: there is no ``=`` or no key.
    """
    key, equals, value = text.partition("=")
    if not equals or not key.strip():
        raise BadInputError(f"--set {text}: must have the form key.subkey=value")
    try:
        parsed = tomllib.loads(f"value = {value}")
    except tomllib.TOMLDecodeError:
        return key.strip(), value.strip()
    if parsed.keys() != {"value"}:
        raise BadInputError(f"--set {key.strip()}: must set one key to one value")
    return key.strip(), parsed["value"]


def _put(document: dict[str, Any], key: str, value: object) -> None:
    *parents, last = key.split(".")
    for parent in parents:
        document = document.setdefault(parent, {})
        if not isinstance(document, dict):
            raise BadInputError(f"--set {key}: {parent} is a value, must be a table")
    document[last] = value


def _drop_stale_options(document: dict[str, Any], overrides: Overrides) -> None:
    """Where an override picks another option of a table, forget the file's keys that only the old one had."""
    for key in overrides:
        table_key, _, field = key.rpartition(".")
        options = keys_of(Scenario).options(table_key) if field in ("scheme", "kind") else {}
        fields = options.get(str(overrides[key]))
        if fields is None:
            continue
        table = document
        for part in table_key.split("."):
            table = table[part]
        for name in set(table) - fields:
            if f"{table_key}.{name}" not in overrides:
                del table[name]
