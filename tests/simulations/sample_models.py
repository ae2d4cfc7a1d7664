"""Models of the user's own, for tests: what ``model.source`` may name, and what it must not."""

from __future__ import annotations

import torch
from opacus.layers import DPGRU
from torch import nn


class Experts(nn.Module):
    """A soft mixture of the experts that are held, by a router over all of them."""

    def __init__(self, width: int, routed: int, held: tuple[int, ...]) -> None:
        super().__init__()
        self.held = held
        self.router = nn.Linear(width, routed, bias=False)
        self.experts = nn.ModuleDict({str(e): nn.Linear(width, width) for e in held})

    def forward(self, x_BD: torch.Tensor) -> torch.Tensor:
        weight_BE = self.router(x_BD)[:, list(self.held)].softmax(-1)
        out_BED = torch.stack([torch.tanh(self.experts[str(e)](x_BD)) for e in self.held], dim=1)
        return x_BD + (out_BED * weight_BE.unsqueeze(-1)).sum(1)


class Mixture(nn.Module):
    def __init__(self, config, held) -> None:
        super().__init__()
        encoder = config.encoder
        values = encoder.channels * encoder.height * encoder.width
        self.embed = nn.Linear(values, config.width)
        self.layers = nn.ModuleList(Experts(config.width, config.experts.routed, held[n]) for n in range(config.layers))
        self.score = nn.Linear(config.width, config.head.classes)

    def forward(self, image_BCHW: torch.Tensor) -> torch.Tensor:
        x_BD = self.embed(image_BCHW.flatten(1) - 0.3)
        for layer in self.layers:
            x_BD = layer(x_BD)
        return self.score(x_BD)


def mixture(config, held):
    return Mixture(config, held)


def plain(config, held):
    """No experts at all: everything is shared."""
    return nn.Sequential(nn.Flatten(), nn.Linear(config.encoder.height * config.encoder.width, config.head.classes))


def greedy(config, held):
    """Holds every expert, whatever it was asked for."""
    return Mixture(config, config.all_experts)


def stateful(config, held):
    return nn.Sequential(nn.Flatten(), nn.BatchNorm1d(64), nn.Linear(64, config.head.classes))


def narrow(config, held):
    return plain(config, held).half()


def nothing(config, held):
    return 7


class Remembering(nn.Module):
    """Remembers, outside parameters and buffers, how often it ran: what no state check of torch can see."""

    def __init__(self, classes: int) -> None:
        super().__init__()
        self.score = nn.Linear(64, classes)
        self.calls = 0

    def forward(self, image_BCHW: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        return self.score(image_BCHW.flatten(1)) * self.calls


def remembering(config, held):
    return Remembering(config.head.classes)


class TwoNames(nn.Module):
    """One weight of two layers; and one that Opacus's recurrent layers hold under two names."""

    def __init__(self, classes: int) -> None:
        super().__init__()
        self.memory = DPGRU(8, 8, batch_first=True)
        self.first, self.second = nn.Linear(8, 8), nn.Linear(8, 8)
        self.second.weight = self.first.weight
        self.score = nn.Linear(8, classes)

    def forward(self, image_BCHW: torch.Tensor) -> torch.Tensor:
        x_BD = self.memory(image_BCHW.squeeze(1))[0][:, -1]
        return self.score(torch.tanh(self.second(torch.tanh(self.first(x_BD)))))


def two_names(config, held):
    return TwoNames(config.head.classes)


def two_owners(config, held):
    """An expert's weight is a shared one, too: its holders alone could not keep them the same."""
    model = Mixture(config, held)
    model.more = nn.Linear(config.width, config.width)
    next(iter(model.layers[0].experts.values())).weight = model.more.weight
    return model


def one_memory(config, held):
    """Two parameters that are views of one memory."""
    model = TwoNames(config.head.classes)
    model.second.weight = nn.Parameter(model.first.weight.data.t())
    return model
