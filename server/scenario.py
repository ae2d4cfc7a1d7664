"""A scenario: one TOML file that describes a whole federation. It composes every folder's configuration."""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from copy import deepcopy
from pathlib import Path
from typing import Any, ClassVar

import tomli_w
from pydantic import Field, ValidationError, model_validator

from conclave.base.errors import BadInputError
from conclave.base.explain import explain, keys_of
from conclave.base.frozen import Frozen
from conclave.base.reading import read_text
from conclave.base.toml_file import load_toml, parse_toml, refuse_extremes
from conclave.data.config import DataConfig, PartitionConfig, taking_part
from conclave.data.sources import schema_of
from conclave.model.config import ModelConfig
from conclave.privacy.accounting.calibration import calibrate_noise
from conclave.privacy.accounting.mechanisms import SampledGaussian
from conclave.privacy.training.config import PrivacyConfig
from conclave.protocol.charges import calibrated_noise
from conclave.protocol.encodings import TrafficConfig
from conclave.protocol.plan import ChoicePlan, EvaluationPlan, Plan, TrainingConfig
from conclave.server.aggregate.balancing import BalancingConfig
from conclave.server.assign.config import ChoiceConfig, PoissonCohort
from conclave.server.node_level.config import NodePrivacyConfig
from conclave.server.rounds.config import EvaluationConfig, FederationConfig
from conclave.server.rounds.coverage import shortage

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
    node_privacy: NodePrivacyConfig | None = None
    balancing: BalancingConfig | None = None
    affinity: ChoiceConfig | None = None
    traffic: TrafficConfig = TrafficConfig()
    evaluation: EvaluationConfig | None = None

    younger: ClassVar[frozenset[str]] = frozenset({"affinity", "balancing", "evaluation", "node_privacy", "traffic"})

    @model_validator(mode="after")
    def _fits_node_level(self) -> Scenario:
        """Refuse everything that would let the step depend on who is there, except through the noised sum."""
        if self.node_privacy is None:
            return self
        federation = self.federation
        if self.balancing is not None:
            raise ValueError("balancing is set, must be left out with node_privacy: biases follow from who is there")
        if self.evaluation is not None:
            raise ValueError("evaluation is set, must be left out with node_privacy: it tells nodes apart")
        if not isinstance(federation.cohort, PoissonCohort):
            raise ValueError(f"federation.cohort.kind is {federation.cohort.kind}, must be poisson with node_privacy")
        for key, value, allowed in (
            ("assignment", federation.assignment, ("random", "all")),
            ("weights", federation.weights, ("uniform",)),
            ("min_holders", federation.min_holders, (1,)),
            ("min_replies", federation.min_replies, (1,)),
            ("step_scale", federation.step_scale, ("none",)),
            ("aggregation.kind", federation.aggregation.kind, ("mean",)),
            ("noise_test", "set" if federation.noise_test else "left out", ("left out",)),
            ("capacities", list(federation.capacities), ([],)),
        ):
            if value not in allowed:
                choices = " or ".join(map(str, allowed))
                raise ValueError(f"federation.{key} is {value}, must be {choices} with node_privacy")
        return self

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
        least = min(self.capacities)
        if least < experts.top_k:
            raise ValueError(f"federation.capacities has {least}, must be at least model.experts.top_k {experts.top_k}")
        short = shortage(self.federation, experts.routed, self.capacities)
        if short is not None and self.node_privacy is None:  # at node level nothing may depend on who is there
            raise ValueError(short)
        scope, local = self.federation.expert_scope, self.federation.local_experts
        if scope == "mixed" and not 1 <= local < experts.routed:
            raise ValueError(
                f"federation.local_experts is {local}, must be from 1 to {experts.routed - 1} with expert_scope 'mixed'"
            )
        if scope != "mixed" and local:
            raise ValueError(f"federation.local_experts is {local}, must be left out with expert_scope '{scope}'")
        if self.federation.min_replies > self.nodes:
            raise ValueError(
                f"federation.min_replies is {self.federation.min_replies}, must be at most partition.nodes {self.nodes}"
            )
        schema = schema_of(self.data)
        mismatch = None if schema is None else schema.mismatch(self.model)
        if mismatch is not None:
            raise ValueError(f"{mismatch} for data.source {self.data.source}")
        if self.balancing is not None:
            self._check_balancing()
        if self.federation.noise_test is not None:
            self._check_noise_test()
        if (self.affinity is None) == (self.federation.assignment == "affinity"):
            raise ValueError(
                f"federation.assignment is {self.federation.assignment}, must be affinity with [affinity], only there"
            )
        if self.evaluation is not None and self.evaluation.experts == "all" and self._local_experts:
            raise ValueError(
                f"evaluation.experts is all, must be assigned with federation.expert_scope '{scope}': a node has no "
                "other node's experts"
            )
        if self.affinity is not None and self.privacy.mechanism == "none":
            raise ValueError("privacy.mechanism is none, must be gaussian with [affinity]: choices are charged")
        return self

    @property
    def nodes(self) -> int:
        """How many nodes a simulation has."""
        return len(taking_part(self.partition))

    @property
    def capacities(self) -> list[int]:
        """How many experts of a layer each simulated node can hold."""
        given = self.federation.capacities or (self.model.experts.routed,)
        return [given[number % len(given)] for number in taking_part(self.partition)]

    def _check_noise_test(self) -> None:
        """Refuse it if the noise of a delta is not public."""
        for key, value, allowed, why in (
            ("privacy.mechanism", self.privacy.mechanism, ("gaussian",), "without noise there is none to look like"),
            (
                "privacy.clipping",
                self.privacy.clipping,
                ("flat", "per-layer", "automatic"),
                "noise is a multiple of the clip bound, and where an adaptive one stands only the node knows",
            ),
            (
                "training.optimizer.kind",
                self.training.optimizer.kind,
                ("sgd",),
                "what Adam makes of noise depends on the gradients",
            ),
            (
                "model.preset",
                self.model.preset,
                ("moe", "deep-moe", "transformer"),
                "a model of one's own does not say which of its parameters are trained",
            ),
        ):
            if value not in allowed:
                raise ValueError(f"{key} is {value}, must be {' or '.join(allowed)} with federation.noise_test: {why}")

    def _check_balancing(self) -> None:
        if self.privacy.mechanism == "none":
            raise ValueError("privacy.mechanism is none, must be gaussian with [balancing]: loads are released noised")
        if self.model.source is not None:
            raise ValueError(
                "model.preset is own, must be another with [balancing]: a model of one's own does not say how it routes"
            )
        if not self.model.experts.router.biased:
            raise ValueError(
                f"model.experts.router.kind is {self.model.experts.router.kind} without a selection bias, must have "
                "one for [balancing] to move: sigmoid, hierarchical of style group-limited, or softmax or attention "
                "with selection_bias = true"
            )

    def plan(self) -> Plan:
        """Return what the run will ask of every node, with σ calibrated for taking part in every round.

        Raises:
            BadInputError: no noise multiplier satisfies (ε, δ).
        """
        if self.privacy.mechanism == "none":
            return self._plan(None, None)
        aside, draft, delta = self.evaluation, self._plan(1.0, 1.0), self.privacy.delta
        noise = calibrated_noise(draft, "training", epsilon=self.privacy.epsilon, delta=delta)
        if aside is None:
            return self._plan(noise, None)
        epsilon = self.privacy.epsilon if aside.epsilon is None else aside.epsilon
        return self._plan(noise, calibrated_noise(draft, "held-out", epsilon=epsilon, delta=delta))

    def _plan(self, noise: float | None, noise_aside: float | None) -> Plan:
        """Return the plan with σ of what training releases, and of each evaluation of held-out units."""
        evaluation = self.evaluation
        return Plan(
            model=self.model,
            privacy=self.privacy,
            training=self.training,
            rounds=self.federation.rounds,
            noise_multiplier=noise,
            local_experts=self._local_experts,
            affinity=self._choice_plan,
            traffic=self.traffic,
            load_share=0.0 if self.balancing is None else self.balancing.share,
            evaluation=None
            if evaluation is None
            else EvaluationPlan(every=evaluation.every, experts=evaluation.experts, noise_multiplier=noise_aside),
        )

    @property
    def _choice_plan(self) -> ChoicePlan | None:
        if self.affinity is None:
            return None
        return ChoicePlan(
            epsilon=self.affinity.epsilon, every=self.affinity.every, experts=self.federation.experts_per_node
        )

    @property
    def _local_experts(self) -> int:
        return self.model.experts.routed if self.federation.expert_scope == "local" else self.federation.local_experts

    def node_mechanism(self) -> SampledGaussian | None:
        """Return what a round is charged at node level, with σ calibrated for all rounds; None where nothing is.

        Raises:
            BadInputError: no noise multiplier satisfies (ε, δ).
        """
        if self.node_privacy is None or not isinstance(self.federation.cohort, PoissonCohort):
            return None
        rate = self.federation.cohort.rate
        noise = calibrate_noise(
            epsilon=self.node_privacy.epsilon,
            delta=self.node_privacy.delta,
            sampling_rate=rate,
            steps_per_charge=1,
            charges=self.federation.rounds,
        )
        return SampledGaussian(sampling_rate=rate, noise_multiplier=noise, steps=1)

    def to_toml(self) -> str:
        """Return the resolved scenario, every default written out."""
        return tomli_w.dumps(self.model_dump(mode="json", exclude_none=True))

    def toml_for_hash(self) -> str:
        """Return the same without younger keys that are at their defaults; see :class:`conclave.base.frozen.Frozen`."""
        return tomli_w.dumps(self.model_dump(mode="json", exclude_none=True, exclude=self.nothing_new()))


def read_scenario(path: Path, overrides: Overrides | None = None) -> Scenario:
    """Read a scenario file.

    Args:
        overrides: dotted key → value, put in place before validation.

    Raises:
        BadInputError: one sentence that names the file, the key, the value and what is allowed.
    """
    return parse_scenario(read_text(path, "a scenario file in TOML"), where=str(path), overrides=overrides)


def parse_scenario(text: str, *, where: str, overrides: Overrides | None = None) -> Scenario:
    """Parse a scenario; ``where`` names its origin in errors. Raises as :func:`read_scenario`."""
    document = parse_toml(text, where=where)
    for key, value in (overrides or {}).items():
        _put(document, key, deepcopy(value))  # a later key may lie within it
    refuse_extremes(document, where=where)  # a key of many parts nests, too
    _drop_stale_options(document, overrides or {})
    try:
        return Scenario.model_validate(document)
    except ValidationError as error:
        raise BadInputError(f"{where}: {explain(error, Scenario)}") from error


def parse_override(text: str) -> tuple[str, Any]:
    """Split ``a.b=value``; the value is TOML, or a bare string.

    Raises:
        BadInputError: there is no ``=`` or no key, or the value is nested too deeply or an integer too long.
    """
    key, equals, value = text.partition("=")
    if not equals or not key.strip():
        raise BadInputError(f"--set {text}: must have the form key.subkey=value")
    try:
        parsed = load_toml(f"value = {value}", where=f"--set {key.strip()}")
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
    """If an override picks another option of a table, forget the file's keys that only the old option had."""
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
