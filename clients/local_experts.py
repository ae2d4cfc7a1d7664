"""Experts that never leave a node: where they begin, and how they are kept between rounds."""

from __future__ import annotations

from collections.abc import Mapping

from safetensors.torch import load
from torch import Tensor

from conclave.model import parameters
from conclave.model.building import build
from conclave.model.experts.config import HeldExperts
from conclave.protocol.plan import Plan
from conclave.protocol.tensor_array import pack

_SEED_DIGITS = 15


def state_name(run_id: str, plan: Plan) -> str:
    """Return the name under which the ledger keeps a run's local experts; unlike the clip, they outlive the run."""
    return f"local-experts/{run_id}/{plan.hash}"


def local_experts(plan: Plan, held: HeldExperts, kept: bytes | None) -> dict[str, Tensor]:
    """Return wire name → float32 of the held experts that stay on the node; empty if all travel.

    An expert that the node has not trained yet starts from what the plan's hash gives, public and the same everywhere.

    Args:
        kept: what :func:`packed` returned after the last round.
    """
    names = [name for name in parameters.shapes(plan.model, held) if plan.stays(name)]
    trained = {} if kept is None else load(kept)
    if all(name in trained for name in names):
        return {name: trained[name] for name in names}
    network = build(plan.model, int(plan.hash[:_SEED_DIGITS], 16))
    fresh = parameters.split(network.state_dict(), network.held)
    return {name: trained.get(name, fresh[name]) for name in names}


def packed(kept: bytes | None, trained: Mapping[str, Tensor]) -> bytes:
    """Return all local experts as bytes: those just trained, and the others as they were."""
    return pack({**({} if kept is None else load(kept)), **trained})
