"""Evaluation of the global model on public held-out data."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from conclave.data.stdlib_text import order0_entropy
from conclave.model import parameters
from conclave.model.building import from_state
from conclave.model.config import ModelConfig
from conclave.model.records import Records

_CHUNK = 512


@dataclass(frozen=True)
class Evaluation:
    """Quality of a model on a public test split. What does not apply to a task is None.

    accuracy: share of right classes. bits_per_byte: mean cross-entropy of a next byte; order0_bits_per_byte: the
    entropy of the same bytes without any context.
    …_without_experts: with every routed expert's output set to zero. The gap is the routed experts' work.
    load: per layer, the share of routed tokens that each expert received; sums to 1.
    """

    loss: float
    load: tuple[tuple[float, ...], ...]
    accuracy: float | None = None
    accuracy_without_experts: float | None = None
    bits_per_byte: float | None = None
    bits_per_byte_without_experts: float | None = None
    order0_bits_per_byte: float | None = None


def evaluate(config: ModelConfig, wire: Mapping[str, Tensor], test: Records) -> Evaluation:
    """Evaluate a full model (wire names → tensors) on public records."""
    silenced = {
        name: torch.zeros_like(tensor) if parameters.owner(name).group == "expert" else tensor
        for name, tensor in wire.items()
    }
    loss, right, load = _measure(config, wire, test)
    loss_without, right_without, _ = _measure(config, silenced, test)
    if config.head.kind == "classification":
        return Evaluation(loss=loss, load=load, accuracy=right, accuracy_without_experts=right_without)
    return Evaluation(
        loss=loss,
        load=load,
        bits_per_byte=loss / math.log(2.0),
        bits_per_byte_without_experts=loss_without / math.log(2.0),
        order0_bits_per_byte=order0_entropy(test["text"]),
    )


def _measure(
    config: ModelConfig, wire: Mapping[str, Tensor], test: Records
) -> tuple[float, float, tuple[tuple[float, ...], ...]]:
    """Return mean loss in nats, share of right classes (0 without classes), and expert load per layer."""
    held = config.all_experts
    network = from_state(config, held, parameters.join(wire, held)).eval()
    count = len(next(iter(test.values())))
    loss, right = 0.0, 0
    picked = torch.zeros(config.layers, config.experts.routed, dtype=torch.int64)
    with torch.inference_mode():
        for first in range(0, count, _CHUNK):
            batch = {name: tensor[first : first + _CHUNK] for name, tensor in test.items()}
            output = network(batch)
            loss += float(network.task_loss(output, batch).double().sum())
            if "label" in batch:
                right += int((output.scores.argmax(dim=1) == batch["label"]).sum())
            for layer, routing in enumerate(output.routing):
                picked[layer] += routing.load(config.experts.routed)
    load = picked.double() / picked.sum(dim=1, keepdim=True)
    rows = [] if config.source is not None else load.tolist()  # how a model of the user's own routes, it does not say
    return loss / count, right / count, tuple(tuple(row) for row in rows)
