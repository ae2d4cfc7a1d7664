"""Task heads: from tokens [B, T, D] to scores and a per-example loss."""

from __future__ import annotations

from collections.abc import Mapping

import torch.nn.functional as F
from torch import Tensor, nn

from model.config import ClassificationConfig


class ClassificationHead(nn.Module):
    """Mean over tokens, then a linear map to class scores."""

    def __init__(self, config: ClassificationConfig, width: int) -> None:
        super().__init__()
        self.score = nn.Linear(width, config.classes, bias=False)

    def forward(self, x_BTD: Tensor) -> Tensor:
        """Return class scores [B, classes] (logits)."""
        scores_BC: Tensor = self.score(x_BTD.mean(dim=1))
        return scores_BC

    def loss(self, scores_BC: Tensor, batch: Mapping[str, Tensor]) -> Tensor:
        """Return the cross-entropy with ``label`` of each example, shape [B], in nats."""
        return F.cross_entropy(scores_BC, batch["label"], reduction="none")


class NextByteHead(nn.Module):
    """A linear map to 256 scores at every position."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.score = nn.Linear(width, 256, bias=False)

    def forward(self, x_BTD: Tensor) -> Tensor:
        """Return scores [B, T, 256] of the byte after each position (logits)."""
        scores_BTV: Tensor = self.score(x_BTD)
        return scores_BTV

    def loss(self, scores_BTV: Tensor, batch: Mapping[str, Tensor]) -> Tensor:
        """Return each window's mean cross-entropy over its bytes but the first, shape [B], in nats a byte."""
        target_BT = batch["text"][:, 1:].long()
        return F.cross_entropy(scores_BTV[:, :-1].transpose(1, 2), target_BT, reduction="none").mean(dim=1)
