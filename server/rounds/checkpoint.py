"""Server state on disk after every round: one safetensors file, replaced atomically."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from conclave.base.errors import BadInputError
from conclave.base.reading import parse_json
from conclave.base.whole_file import write_atomically
from conclave.server.aggregate.optimizer import OptimizerState
from conclave.server.replies.noise_likeness import History


@dataclass(frozen=True)
class Checkpoint:
    """Where a run stands after ``round``: global tensors, the server optimizer's state, and what they belong to.

    history: node → wire name → the sum of what it sent, if replies are tested against it. average, averaged: the
    average over rounds, and how many rounds are in it; see :mod:`conclave.server.aggregate.averaging`.
    """

    round: int
    run_id: str
    plan_hash: str
    tensors: Mapping[str, Tensor]
    optimizer: OptimizerState
    history: History = field(default_factory=dict)
    average: Mapping[str, Tensor] = field(default_factory=dict)
    averaged: int = 0

    def check_belongs(self, path: Path, plan_hash: str, run_id: str) -> None:
        """Check that it is of this plan and run.

        Raises:
            BadInputError: it is not.
        """
        if self.plan_hash != plan_hash or self.run_id != run_id:
            raise BadInputError(f"{path}: belongs to another plan, must be of the scenario beside it")


def write_checkpoint(path: Path, checkpoint: Checkpoint) -> None:
    """Write a checkpoint; a crash leaves the previous one whole."""
    path.parent.mkdir(parents=True, exist_ok=True)
    tensors = {f"model:{name}": t.contiguous() for name, t in checkpoint.tensors.items()}
    for name, kept in checkpoint.optimizer.items():
        tensors |= {f"optimizer:{key}:{name}": t.contiguous() for key, t in kept.items()}
    for node, sums in checkpoint.history.items():
        tensors |= {f"history:{node}:{name}": t.contiguous() for name, t in sums.items()}
    tensors |= {f"average:{name}": t.contiguous() for name, t in checkpoint.average.items()}
    state = {"round": checkpoint.round, "run_id": checkpoint.run_id, "plan_hash": checkpoint.plan_hash}
    if checkpoint.averaged:
        state["averaged"] = checkpoint.averaged
    write_atomically(path, save(tensors, metadata={"state": json.dumps(state)}))


def read_checkpoint(path: Path) -> Checkpoint:
    """Read a checkpoint, including older ones that know only momentum or have no average.

    Raises:
        BadInputError: missing or damaged.
    """
    tensors: dict[str, Tensor] = {}
    average: dict[str, Tensor] = {}
    optimizer: defaultdict[str, dict[str, Tensor]] = defaultdict(dict)
    history: defaultdict[str, dict[str, Tensor]] = defaultdict(dict)
    try:
        with safe_open(path, framework="pt") as stream:
            state = parse_json(stream.metadata()["state"])
            for key in stream.keys():  # noqa: SIM118  (not a mapping)
                kind, _, name = key.partition(":")
                if kind in ("model", "average"):
                    (tensors if kind == "model" else average)[name] = stream.get_tensor(key)
                    continue
                if kind == "history":
                    node, _, name = name.partition(":")
                    history[node][name] = stream.get_tensor(key)
                    continue
                what, _, name = {"optimizer": name, "momentum": f"momentum_buffer:{name}"}[kind].partition(":")
                optimizer[name][what] = stream.get_tensor(key)
        return Checkpoint(
            round=int(state["round"]),
            run_id=str(state["run_id"]),
            plan_hash=str(state["plan_hash"]),
            tensors=tensors,
            optimizer=dict(optimizer),
            history=dict(history),
            average=average,
            averaged=int(state.get("averaged", 0)),
        )
    except (OSError, SafetensorError, KeyError, TypeError, ValueError) as error:
        raise BadInputError(f"{path}: missing or damaged, must be a checkpoint") from error
