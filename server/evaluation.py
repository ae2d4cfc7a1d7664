"""Evaluation of the global model on public held-out data."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from data.sources import Records
from model import Network, from_state, parameters
from model.config import ModelConfig


@dataclass(frozen=True)
class Evaluation:
    """Quality of a model on a public test split.

    load: per layer, the share of routed tokens that each expert received; sums to 1.
    accuracy_without_experts: with every routed expert's output set to zero. The gap is the routed experts' work.
    """

    accuracy: float
    loss: float
    load: tuple[tuple[float, ...], ...]
    accuracy_without_experts: float


def evaluate(config: ModelConfig, wire: Mapping[str, Tensor], test: Records) -> Evaluation:
    """Evaluate a full model (wire names → tensors) on public records."""
    held = config.all_experts
    network = from_state(config, held, parameters.join(wire, held)).eval()
    silenced = {
        name: torch.zeros_like(tensor) if parameters.owner(name).group == "expert" else tensor
        for name, tensor in wire.items()
    }
    without = from_state(config, held, parameters.join(silenced, held)).eval()
    with torch.inference_mode():
        output = network(test)
        loss = float(network.head.loss(output.scores_BC, test["label"]).mean())
        load = tuple(tuple(_shares(routing.experts_BTK, config.experts.routed)) for routing in output.routing)
        return Evaluation(
            accuracy=_accuracy(output.scores_BC, test),
            loss=loss,
            load=load,
            accuracy_without_experts=_accuracy(without(test).scores_BC, test),
        )


def _accuracy(scores_BC: Tensor, test: Records) -> float:
    return float((scores_BC.argmax(dim=1) == test["label"]).float().mean())


def _shares(experts_BTK: Tensor, experts: int) -> list[float]:
    counts = torch.bincount(experts_BTK.flatten(), minlength=experts).double()
    return (counts / counts.sum()).tolist()


__all__ = ["Evaluation", "Network", "evaluate"]
