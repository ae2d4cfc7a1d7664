"""A small decoder with sparse experts, made of Conclave's own layers, in the sizes that the benchmarks compare."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from conclave.model.attention.config import MultiHeadConfig
from conclave.model.attention.multi_head import MultiHeadAttention
from conclave.model.experts.config import ExpertsConfig
from conclave.model.experts.moe import MoELayer


class Size(NamedTuple):
    """Batch, tokens, vocabulary, width, expert width, experts, experts per token, layers, heads."""

    batch: int
    tokens: int
    vocabulary: int
    width: int
    hidden: int
    experts: int
    top_k: int
    layers: int
    heads: int


class Decoder(nn.Module):
    """Embedding, pre-norm blocks of attention and routed experts, final norm, linear head; next-token loss."""

    def __init__(self, size: Size) -> None:
        super().__init__()
        self.embed = nn.Embedding(size.vocabulary, size.width)
        experts = ExpertsConfig(routed=size.experts, hidden=size.hidden, top_k=size.top_k, shared=0, balance=0.0)
        attention = MultiHeadConfig(heads=size.heads)
        self.norms = nn.ModuleList(nn.RMSNorm(size.width) for _ in range(2 * size.layers + 1))
        self.attention = nn.ModuleList(MultiHeadAttention(attention, size.width) for _ in range(size.layers))
        self.moe = nn.ModuleList(MoELayer(experts, range(size.experts), size.width) for _ in range(size.layers))
        self.head = nn.Linear(size.width, size.vocabulary, bias=False)
        self.allowed_E = torch.ones(size.experts, dtype=torch.bool)
        for parameter in self.parameters():
            if parameter.dim() > 1:
                nn.init.normal_(parameter, std=parameter.shape[-1] ** -0.5)

    def forward(self, token_BT: Tensor) -> Tensor:
        """Return scores [B, T, V]."""
        x_BTD = self.embed(token_BT)
        for layer, (attention, moe) in enumerate(zip(self.attention, self.moe, strict=True)):
            x_BTD = x_BTD + attention(self.norms[2 * layer](x_BTD))
            y_BTD, _ = moe(self.norms[2 * layer + 1](x_BTD), self.allowed_E)
            x_BTD = x_BTD + y_BTD
        scores: Tensor = self.head(self.norms[-1](x_BTD))
        return scores

    def loss(self, batch: dict[str, Tensor]) -> Tensor:
        """Return the mean cross-entropy of each example, [B]."""
        scores = self(batch["x"])
        return F.cross_entropy(scores.transpose(1, 2), batch["y"], reduction="none").mean(1)
