"""Which attention a configuration asks for."""

from __future__ import annotations

from typing import Literal

from conclave.model.attention.config import AttentionConfig, LatentConfig
from conclave.model.attention.latent import LatentAttention
from conclave.model.attention.multi_head import MultiHeadAttention


def make_attention(
    config: AttentionConfig, width: int, norm: Literal["rms", "none"]
) -> MultiHeadAttention | LatentAttention:
    """Return the configured attention; ``norm`` is the model's, for vectors inside the attention."""
    if isinstance(config, LatentConfig):
        return LatentAttention(config, width, norm)
    return MultiHeadAttention(config, width)
