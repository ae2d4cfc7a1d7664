"""Task heads: from tokens [B, T, D] to an output and a per-example loss."""

from __future__ import annotations

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

    def loss(self, scores_BC: Tensor, label_B: Tensor) -> Tensor:
        """Return the cross-entropy of each example, shape [B], in nats."""
        return F.cross_entropy(scores_BC, label_B, reduction="none")
