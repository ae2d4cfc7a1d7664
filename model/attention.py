"""Causal multi-head attention with rotary positions.

Dimension suffixes: B batch, T tokens, D width, H heads, W head width.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.config import AttentionConfig


def rotate(x_BHTW: Tensor, base: float) -> Tensor:
    """Turn each pair of coordinates (w, w + W/2) of the token at t by the angle ``t · base^(−2w/W)``.

    The product of a rotated query and key then depends on their distance alone. Nothing is stored: the angles are a
    function of shape and base, so the layer has no buffer that could change.
    """
    tokens, half = x_BHTW.shape[-2], x_BHTW.shape[-1] // 2
    exponent = torch.arange(half, device=x_BHTW.device, dtype=torch.float32) / half
    angle_TW = torch.arange(tokens, device=x_BHTW.device, dtype=torch.float32)[:, None] * base**-exponent
    cos_TW, sin_TW = angle_TW.cos().to(x_BHTW.dtype), angle_TW.sin().to(x_BHTW.dtype)
    first, second = x_BHTW[..., :half], x_BHTW[..., half:]
    return torch.cat([first * cos_TW - second * sin_TW, first * sin_TW + second * cos_TW], dim=-1)


class CausalAttention(nn.Module):
    """Each token attends to itself and the tokens before it, within its own example."""

    def __init__(self, config: AttentionConfig, width: int) -> None:
        super().__init__()
        self.config = config
        self.query = nn.Linear(width, width, bias=False)
        self.key = nn.Linear(width, width, bias=False)
        self.value = nn.Linear(width, width, bias=False)
        self.out = nn.Linear(width, width, bias=False)

    def forward(self, x_BTD: Tensor) -> Tensor:
        """Return the attention's output, same shape as the input."""
        batch, tokens, width = x_BTD.shape

        def heads(projected_BTD: Tensor) -> Tensor:
            return projected_BTD.view(batch, tokens, self.config.heads, -1).transpose(1, 2)

        query, key = (rotate(heads(layer(x_BTD)), self.config.rope_base) for layer in (self.query, self.key))
        mixed_BHTW = F.scaled_dot_product_attention(query, key, heads(self.value(x_BTD)), is_causal=True)
        y_BTD: Tensor = self.out(mixed_BHTW.transpose(1, 2).reshape(batch, tokens, width))
        return y_BTD
