"""What a federation of experts is compared with: scenarios made from a scenario, nothing else changed."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal, get_args

from conclave.base.errors import BadInputError
from conclave.data.config import taking_part
from conclave.model import parameters
from conclave.model.config import ModelConfig
from conclave.model.costs import costs_of
from conclave.model.experts.config import ExpertsConfig
from conclave.server.scenario import Scenario, parse_scenario

BaselineKind = Literal["central", "alone", "dense-total", "dense-active"]
KINDS: tuple[BaselineKind, ...] = get_args(BaselineKind)

_STEP = 8  # hidden layers are multiples of it
_MOST = 65_536
_ALL_TRAVEL = {
    "federation.assignment": "all",
    "federation.capacities": [],
    "federation.expert_scope": "federated",
    "federation.local_experts": 0,
}


def baseline(scenario: Scenario, kind: BaselineKind) -> list[Scenario]:
    """Return the scenarios of a baseline; all but ``alone`` have one.

    * ``central``: the pooled records on one node, with the same mechanism and (ε, δ).
    * ``alone``: each node trains the whole model on its own records, for as many rounds; one scenario a node.
    * ``dense-total``, ``dense-active``: the same federation with one expert in place of all, as wide as makes the
      model's parameters, or those active for a token, come closest; see :func:`dense`.

    No baseline has experts that stay on their nodes: there would be no model to compare.

    Raises:
        BadInputError: the model has no such baseline.
    """
    routed, least = scenario.model.experts.routed, min(1, scenario.federation.min_holders)
    whole = {
        **_ALL_TRAVEL,
        "federation.cohort": {"kind": "all"},
        "federation.experts_per_node": routed,
        "federation.min_holders": least,
    }
    if kind == "central":
        pooled = {"partition": {"scheme": "iid", "nodes": 1}}
        return [_changed(scenario, kind, "all records on one node", whole | pooled)]
    if kind == "alone":
        nodes = taking_part(scenario.partition)
        return [_changed(scenario, kind, f"node {n} alone", whole | {"partition.only": n}) for n in nodes]
    model = dense(scenario.model, kind)
    wanted, got = size_match(scenario.model, model, kind)
    experts = model.experts.model_dump(mode="json")
    changes = {**_ALL_TRAVEL, "model.experts": experts, "federation.experts_per_node": 1}
    what = f"dense, {model.experts.hidden} hidden values, {got:,} parameters for {wanted:,}"
    return [_changed(scenario, kind, what, changes)]


def dense(model: ModelConfig, kind: Literal["dense-total", "dense-active"]) -> ModelConfig:
    """Return the model with a single expert for all tokens, with the same depth and activation.

    Its hidden width is the multiple of 8 with the nearest count of parameters; of two as near, the smaller. There is
    nothing to route or to balance; a router of one expert, ``width`` parameters a layer, stays and changes nothing.

    Raises:
        BadInputError: a model of the user's own, or the network would have to be wider than is allowed.
    """
    if model.source is not None:
        raise BadInputError(f"--baseline {kind}: model.source is {model.source}, must not be a model of one's own")
    wanted = _wanted(model, kind)
    low, high = 1, _MOST // _STEP
    while low < high:  # the narrowest that has no fewer
        middle = (low + high) // 2
        if _count(_dense(model, middle)) < wanted:
            low = middle + 1
        else:
            high = middle
    if _count(_dense(model, low)) < wanted:
        raise BadInputError(f"--baseline {kind}: {wanted:,} parameters need more than {_MOST} hidden values")
    return min((_dense(model, n) for n in (low - 1, low) if n), key=lambda found: abs(_count(found) - wanted))


def size_match(model: ModelConfig, dense: ModelConfig, kind: Literal["dense-total", "dense-active"]) -> tuple[int, int]:
    """Return the parameters that were to be matched, and those of the dense model."""
    return _wanted(model, kind), _count(dense)


def _wanted(model: ModelConfig, kind: BaselineKind) -> int:
    costs = costs_of(model)
    return costs.total if kind == "dense-total" else costs.active


def _dense(model: ModelConfig, eighths: int) -> ModelConfig:
    old = model.experts
    experts = ExpertsConfig(
        routed=1, top_k=1, hidden=_STEP * eighths, balance=0.0, depth=old.depth, activation=old.activation
    )
    return model.model_copy(update={"experts": experts})


def _count(model: ModelConfig) -> int:
    return sum(shape.numel() for shape in parameters.shapes(model, model.all_experts).values())


def _changed(scenario: Scenario, kind: BaselineKind, what: str, changes: Mapping[str, Any]) -> Scenario:
    name = f"{scenario.name[: 63 - len(kind)]}-{kind}"
    label = {"name": name, "description": f"Baseline of {scenario.name}: {what}"}
    return parse_scenario(scenario.to_toml(), where=f"--baseline {kind}", overrides={**label, **changes})
