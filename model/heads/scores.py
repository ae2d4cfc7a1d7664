"""Task heads: from tokens [B, T, D] to scores and a per-example loss."""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from conclave.model.heads.config import ClassificationConfig
from conclave.model.layers.padding import mean_over_present, present_tokens


class ClassificationHead(nn.Module):
    """Mean over tokens, then a linear map to class scores."""

    def __init__(self, config: ClassificationConfig, width: int) -> None:
        super().__init__()
        self.score = nn.Linear(width, config.classes, bias=False)

    def forward(self, x_BTD: Tensor, present_BT: Tensor | None = None) -> Tensor:
        """Return class scores [B, classes] (logits); padding does not enter the mean."""
        pooled_BD = x_BTD.mean(dim=1) if present_BT is None else mean_over_present(x_BTD, present_BT)
        scores_BC: Tensor = self.score(pooled_BD)
        return scores_BC

    def loss(self, scores_BC: Tensor, batch: Mapping[str, Tensor]) -> Tensor:
        """Return the cross-entropy with ``label`` of each example, shape [B], in nats."""
        return F.cross_entropy(scores_BC, batch["label"], reduction="none")


class NextByteHead(nn.Module):
    """A linear map to 256 scores at every position."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.score = nn.Linear(width, 256, bias=False)

    def forward(self, x_BTD: Tensor, present_BT: Tensor | None = None) -> Tensor:
        """Return scores [B, T, 256] of the byte after each position (logits), those at padding have no meaning."""
        scores_BTV: Tensor = self.score(x_BTD)
        return scores_BTV

    def loss(self, scores_BTV: Tensor, batch: Mapping[str, Tensor]) -> Tensor:
        """Return each window's mean cross-entropy over its bytes but the first, shape [B], in nats a byte."""
        return byte_loss(scores_BTV[:, :-1], batch, ahead=1)


def byte_loss(scores_BTV: Tensor, batch: Mapping[str, Tensor], *, ahead: int) -> Tensor:
    """Return the mean cross-entropy of the byte ``ahead`` positions on, over the positions that have one: [B].

    Args:
        scores_BTV: of all positions but the last ``ahead``.
        batch: ``text`` and, where there is padding, ``length``; an example without such a position has loss 0.
    """
    target_BT = batch["text"][:, ahead:].long()
    present_BT = present_tokens(batch, batch["text"].shape[1])
    if present_BT is None:
        return F.cross_entropy(scores_BTV.transpose(1, 2), target_BT, reduction="none").mean(dim=1)
    target_BT = torch.where(present_BT[:, ahead:], target_BT, 0)  # padding may be no byte at all
    loss_BT = F.cross_entropy(scores_BTV.transpose(1, 2), target_BT, reduction="none")
    return mean_over_present(loss_BT, present_BT[:, ahead:])
