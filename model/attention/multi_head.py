"""Multi-head attention with rotary positions, and what every kind of attention shares.

Dimension suffixes: B batch, T tokens, D width, H heads, W head width.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from conclave.model.attention.config import MultiHeadConfig
from conclave.model.layers.padding import only_present


def rotate(x_BHTW: Tensor, base: float) -> Tensor:
    """Turn each pair of coordinates (w, w + W/2) of the token at t by the angle ``t · base^(−2w/W)``.

    The product of a rotated query and key then depends on their distance alone (Su et al. 2021, arXiv:2104.09864).
    Nothing is stored: the angles are a function of shape and base, so the layer has no buffer that could change.
    """
    tokens, half = x_BHTW.shape[-2], x_BHTW.shape[-1] // 2
    wide = torch.promote_types(x_BHTW.dtype, torch.float32)  # bf16 could not tell large angles apart
    exponent = torch.arange(half, device=x_BHTW.device, dtype=wide) / half
    angle_TW = torch.arange(tokens, device=x_BHTW.device, dtype=wide)[:, None] * base**-exponent
    cos_TW, sin_TW = angle_TW.cos().to(x_BHTW.dtype), angle_TW.sin().to(x_BHTW.dtype)
    first, second = x_BHTW[..., :half], x_BHTW[..., half:]
    return torch.cat([first * cos_TW - second * sin_TW, first * sin_TW + second * cos_TW], dim=-1)


def split_heads(x_BTD: Tensor, heads: int) -> Tensor:
    """Turn [B, T, H·W] into [B, H, T, W]."""
    batch, tokens, width = x_BTD.shape
    return x_BTD.view(batch, tokens, heads, width // heads).transpose(1, 2)


def attend(
    query_BHTW: Tensor, key_BHTW: Tensor, value_BHTW: Tensor, *, causal: bool, present_BT: Tensor | None
) -> Tensor:
    """Mix values by softmax of ``query · key / √W``, within each example: [B, T, H·(width of a value)].

    Args:
        causal: a token attends to itself and those before it; otherwise to all.
        present_BT: the real tokens; no token attends to padding. The inputs must be finite at padding.
    """
    allowed_BHTT = None
    if present_BT is not None:
        tokens = present_BT.shape[1]
        # A padded token sees itself: without any key its softmax would be 0/0. What it finds is nobody's business.
        itself_TT = torch.eye(tokens, dtype=torch.bool, device=present_BT.device)
        allowed_BHTT = (present_BT[:, None, :] | itself_TT).unsqueeze(1)
        if causal:
            allowed_BHTT = allowed_BHTT.tril()
    mixed_BHTW = F.scaled_dot_product_attention(
        query_BHTW, key_BHTW, value_BHTW, attn_mask=allowed_BHTT, is_causal=causal and allowed_BHTT is None
    )
    return mixed_BHTW.transpose(1, 2).flatten(2)


class MultiHeadAttention(nn.Module):
    """Each token attends to the tokens before it and itself, or to all, within its own example."""

    def __init__(self, config: MultiHeadConfig, width: int) -> None:
        super().__init__()
        self.config = config
        self.query = nn.Linear(width, width, bias=False)
        self.key = nn.Linear(width, width, bias=False)
        self.value = nn.Linear(width, width, bias=False)
        self.out = nn.Linear(width, width, bias=False)

    def forward(self, x_BTD: Tensor, present_BT: Tensor | None = None) -> Tensor:
        """Return the attention's output, same shape as the input.

        Args:
            x_BTD: float tokens; padding may hold anything.
            present_BT: bool, the real tokens; all if not given. The output at padding is exactly 0.
        """
        c = self.config
        x_BTD = only_present(x_BTD, present_BT)
        query, key, value = (split_heads(layer(x_BTD), c.heads) for layer in (self.query, self.key, self.value))
        query, key = rotate(query, c.rope_base), rotate(key, c.rope_base)
        y_BTD: Tensor = self.out(attend(query, key, value, causal=c.causal, present_BT=present_BT))
        return only_present(y_BTD, present_BT)
