"""Multi-head latent attention: keys and values of all heads come from one short vector per token.

DeepSeek-V2, arXiv:2405.04434, §2.1. What a generating model keeps of a past token is that vector and one rotated key
that all heads share, ``kv_rank + rope_width`` values, where multi-head attention keeps ``2·width``.

Dimension suffixes: B batch, T tokens, D width, H heads, W head width (content), R rotated width, C latent width.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn

from conclave.model.attention.config import LatentConfig
from conclave.model.attention.multi_head import attend, rotate, split_heads
from conclave.model.layers.norms import make_norm
from conclave.model.layers.padding import only_present


class LatentAttention(nn.Module):
    """Low-rank joint compression of keys and values, optionally of queries, and decoupled rotary positions.

    A rotation between the two factors of a low-rank product could not be absorbed into them, so positions go into
    extra coordinates: each head's query has R rotated ones of its own, the key R that all heads share. A score is
    ``(content query · content key + rotated query · rotated key) / √(W + R)`` (eq. 9–19).

    ``norm`` stands after each latent vector, as in the paper's models (§3.1.2).
    """

    def __init__(self, config: LatentConfig, width: int, norm: Literal["rms", "none"] = "rms") -> None:
        super().__init__()
        self.config = config
        rotated = config.heads * config.rope_width
        self.kv_down = nn.Linear(width, config.kv_rank, bias=False)
        self.kv_norm = make_norm(norm, config.kv_rank)
        self.key_up = nn.Linear(config.kv_rank, width, bias=False)
        self.value_up = nn.Linear(config.kv_rank, width, bias=False)
        self.key_rope = nn.Linear(width, config.rope_width, bias=False)
        self.query_down, query_width = None, width
        if config.query_rank is not None:
            self.query_down, query_width = nn.Linear(width, config.query_rank, bias=False), config.query_rank
            self.query_norm = make_norm(norm, config.query_rank)
        self.query_up = nn.Linear(query_width, width, bias=False)
        self.query_rope = nn.Linear(query_width, rotated, bias=False)
        self.out = nn.Linear(width, width, bias=False)

    def forward(self, x_BTD: Tensor, present_BT: Tensor | None = None) -> Tensor:
        """Return the attention's output, same shape as the input.

        Args:
            x_BTD: float tokens; padding may hold anything.
            present_BT: bool, the real tokens; all if not given. The output at padding is exactly 0.
        """
        c = self.config
        x_BTD = only_present(x_BTD, present_BT)
        kv_BTC = self.kv_norm(self.kv_down(x_BTD))
        query_BTC = x_BTD if self.query_down is None else self.query_norm(self.query_down(x_BTD))
        key_BHTW, value_BHTW = (split_heads(layer(kv_BTC), c.heads) for layer in (self.key_up, self.value_up))
        query_BHTW, query_BHTR = (split_heads(layer(query_BTC), c.heads) for layer in (self.query_up, self.query_rope))
        key_B1TR = rotate(split_heads(self.key_rope(x_BTD), 1), c.rope_base)
        mixed_BTD = attend(
            torch.cat([query_BHTW, rotate(query_BHTR, c.rope_base)], dim=-1),
            torch.cat([key_BHTW, key_B1TR.expand(-1, c.heads, -1, -1)], dim=-1),
            value_BHTW,
            causal=c.causal,
            present_BT=present_BT,
        )
        y_BTD: Tensor = self.out(mixed_BTD)
        return only_present(y_BTD, present_BT)
