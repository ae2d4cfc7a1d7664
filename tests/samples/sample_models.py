"""Models of the user's own, for tests: what ``model.source`` may name, and what it must not."""

from __future__ import annotations

import itertools
import sys

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


def flat(config, *layers):
    return nn.Sequential(nn.Flatten(), *layers, nn.Linear(64, config.head.classes))


def dropout(config, held):
    return flat(config, nn.Dropout(0.1))


def recurrent(config, held):
    return Recurrent(config.head.classes)


class Recurrent(nn.Module):
    def __init__(self, classes: int) -> None:
        super().__init__()
        self.rows, self.score = nn.LSTM(8, 16, batch_first=True), nn.Linear(16, classes)

    def forward(self, image_BCHW: torch.Tensor) -> torch.Tensor:
        return self.score(self.rows(image_BCHW.squeeze(1))[0][:, -1])


class Loop(nn.Module):
    """Sends the rows of a batch to experts one expert after the other: what a layer sees has lost its examples."""

    def __init__(self, config, held) -> None:
        super().__init__()
        self.router = nn.Linear(64, config.experts.routed)
        self.layers = nn.ModuleList([nn.Module()])
        self.layers[0].experts = nn.ModuleDict({str(e): nn.Linear(64, config.head.classes) for e in held[0]})
        self.held = held[0]
        self.classes = config.head.classes

    def forward(self, image_BCHW: torch.Tensor) -> torch.Tensor:
        x_BD = image_BCHW.flatten(1)
        weight_BE, chosen_B = self.router(x_BD)[:, list(self.held)].softmax(-1).max(-1)
        scores = x_BD.new_zeros(len(x_BD), self.classes)
        for place, expert in enumerate(self.held):
            mine = chosen_B == place
            if mine.any():
                scores[mine] = self.layers[0].experts[str(expert)](x_BD[mine])
        return scores * weight_BE.unsqueeze(1)


def loop(config, held):
    return Loop(config, held)


def lazy(config, held):
    return nn.Sequential(nn.Flatten(), nn.LazyLinear(config.head.classes))


def no_file(config, held):
    raise RuntimeError("weights are\nnot there")


def seven(config, held):
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 7))


def whole_numbers(config, held):
    class Rounding(nn.Linear):
        def forward(self, x):
            return super().forward(x).long()

    return nn.Sequential(nn.Flatten(), Rounding(64, config.head.classes))


def too_wide(config, held):
    return nn.Sequential(nn.Flatten(), nn.Linear(65, config.head.classes))


def lost(config, held):
    model = flat(config)
    nn.init.constant_(model[1].weight, float("nan"))
    return model


class Growing(nn.Linear):
    def forward(self, x):
        with torch.no_grad():
            self.weight.mul_(1.01)
        return super().forward(x.flatten(1))


def growing(config, held):
    return Growing(64, config.head.classes)


class Scores(nn.Module):
    """Scores of a picture, of which models that go wrong in their own ways are made."""

    def __init__(self, config, rule) -> None:
        super().__init__()
        self.linear, self.rule = nn.Linear(64, config.head.classes), rule

    def forward(self, image_BCHW: torch.Tensor) -> torch.Tensor:
        return self.rule(self.linear, image_BCHW.flatten(1))


def functional_dropout(config, held):
    return Scores(config, lambda linear, x_BD: linear(torch.nn.functional.dropout(x_BD, 0.5)))


def centred(config, held):
    return Scores(config, lambda linear, x_BD: linear(x_BD - x_BD.mean(0)))


def detached(config, held):
    return Scores(config, lambda linear, x_BD: linear(x_BD).detach())


def frozen(config, held):
    return plain(config, held).requires_grad_(False)


def leaving(config, held):
    sys.exit("no\x1b[31m")


def leaving_later(config, held):
    return Scores(config, lambda linear, x_BD: sys.exit(3))


class SpeechlessError(Exception):
    def __str__(self) -> str:
        raise RuntimeError


def speechless(config, held):
    raise SpeechlessError


_widths = itertools.count(3)


def different(config, held):
    """Is another model each time."""
    width = next(_widths)
    return nn.Sequential(nn.Flatten(), nn.Linear(64, width), nn.Linear(width, config.head.classes))


def only_all(config, held):
    """Uses every expert, also where it is given a part."""
    model = Mixture(config, held)
    for layer in model.layers:
        layer.held = tuple(range(config.experts.routed))
    return model


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
