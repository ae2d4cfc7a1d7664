"""Configuration of attention."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field

from conclave.base.frozen import Frozen


class MultiHeadConfig(Frozen):
    """Multi-head attention with rotary positions (RoPE, Su et al. 2021, arXiv:2104.09864).

    ``causal``: a token attends to itself and those before it; otherwise to all.
    """

    younger = frozenset({"kind", "causal"})
    kind: Literal["multi-head"] = "multi-head"
    heads: int = Field(ge=1, le=256)
    causal: bool = True
    rope_base: float = Field(default=10_000.0, gt=1.0, le=1e9)


class LatentConfig(Frozen):
    """Multi-head latent attention (DeepSeek-V2, arXiv:2405.04434, §2.1).

    ``kv_rank``: width of the vector from which a token's keys and values are made. ``query_rank``: the same for
    queries; if not given, they come from the token itself. ``rope_width``: rotated coordinates of each head's query,
    and of the one rotated key that all heads share. Apart from these, a head is as wide as in multi-head attention.
    """

    kind: Literal["latent"] = "latent"
    heads: int = Field(ge=1, le=256)
    kv_rank: int = Field(ge=1, le=16_384)
    query_rank: int | None = Field(default=None, ge=1, le=16_384)
    rope_width: int = Field(ge=2, le=1024, multiple_of=2)
    causal: bool = True
    rope_base: float = Field(default=10_000.0, gt=1.0, le=1e9)


def _multi_head_unless_named(value: Any) -> Any:
    return {"kind": "multi-head"} | value if isinstance(value, dict) else value


AttentionConfig = Annotated[
    MultiHeadConfig | LatentConfig, Field(discriminator="kind"), BeforeValidator(_multi_head_unless_named)
]
