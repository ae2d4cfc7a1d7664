"""Predicting the byte after next, a second task in training.

Multi-token prediction of depth 1 (DeepSeek-V3, arXiv:2412.19437, §2.2, eq. 21–25). Here the depth's block has
attention and one dense feed-forward network, not another MoE layer: experts of a layer that only training uses would
travel to every node for nothing.

Dimension suffixes: B batch, T tokens, D width.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn

from conclave.base.errors import BadInputError
from conclave.model.attention.config import AttentionConfig
from conclave.model.attention.kinds import make_attention
from conclave.model.experts.config import ExpertsConfig
from conclave.model.experts.stacked import SharedExpert
from conclave.model.layers.norms import make_norm


class AfterNext(nn.Module):
    """From a token, which knows the bytes up to its own, and the next byte's embedding: what comes after that.

    weight: λ, the share of this task in the training loss.
    """

    def __init__(
        self,
        width: int,
        attention: AttentionConfig,
        experts: ExpertsConfig,
        *,
        norm: Literal["rms", "none"],
        weight: float,
    ) -> None:
        super().__init__()
        self.weight = weight
        self.token_norm = make_norm(norm, width)
        self.byte_norm = make_norm(norm, width)
        self.combine = nn.Linear(2 * width, width, bias=False)
        self.attention_norm = make_norm(norm, width)
        self.attention = make_attention(attention, width, norm)
        self.feed_forward_norm = make_norm(norm, width)
        self.feed_forward = SharedExpert(experts.model_copy(update={"shared": 1}), width)
        self.norm = make_norm(norm, width)

    def forward(self, x_BTD: Tensor, embedded_BTD: Tensor, present_BT: Tensor | None = None) -> Tensor:
        """Return tokens for the head, [B, T − 2, D]: the last two positions have no byte after next.

        Args:
            x_BTD: the trunk's tokens, before the norm that precedes the head.
            embedded_BTD: the encoder's, so that its table is looked up once for both tasks.
            present_BT: bool, the real tokens; all if not given.

        Raises:
            BadInputError: there are fewer than 3 tokens.
        """
        if x_BTD.shape[1] < 3:
            raise BadInputError(
                f"text of {x_BTD.shape[1]} bytes, must be at least 3 where model.head.after_next is trained"
            )
        token_BTD, byte_BTD = self.token_norm(x_BTD[:, :-2]), self.byte_norm(embedded_BTD[:, 1:-1])
        y_BTD: Tensor = self.combine(torch.cat([token_BTD, byte_BTD], dim=-1))
        # A real token whose next byte is padding has nothing to predict, and is not to be attended to either.
        next_BT = None if present_BT is None else present_BT[:, 1:-1]
        y_BTD = y_BTD + self.attention(self.attention_norm(y_BTD), next_BT)
        y_BTD = y_BTD + self.feed_forward(self.feed_forward_norm(y_BTD))
        out_BTD: Tensor = self.norm(y_BTD)
        return out_BTD
