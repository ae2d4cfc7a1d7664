"""Which attention a configuration asks for."""

from __future__ import annotations

from typing import Literal

from model.attention import MultiHeadAttention
from model.config import AttentionConfig, LatentConfig
from model.latent_attention import LatentAttention


def make_attention(
    config: AttentionConfig, width: int, norm: Literal["rms", "none"]
) -> MultiHeadAttention | LatentAttention:
    """Return the configured attention; ``norm`` is the model's, for vectors inside the attention."""
    if isinstance(config, LatentConfig):
        return LatentAttention(config, width, norm)
    return MultiHeadAttention(config, width)
