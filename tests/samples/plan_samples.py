"""A plan, and a request under it."""

from __future__ import annotations

from conftest import make_config

from conclave.protocol.messages import TrainRequest
from conclave.protocol.plan import Plan


def plan(**changes) -> Plan:
    document = {
        "model": make_config(),
        "privacy": {"epsilon": 8.0, "delta": 1e-5, "clip": 1.0, "sampling_rate": 0.5},
        "training": {"learning_rate": 0.5},
        "rounds": 10,
        "noise_multiplier": 2.0,
    }
    return Plan.model_validate(document | changes)


def request(**changes) -> TrainRequest:
    return TrainRequest(
        **({"run_id": "1", "scenario": "test", "round": 1, "plan": plan(), "held": {0: (1, 3)}} | changes)
    )
