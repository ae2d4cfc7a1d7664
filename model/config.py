"""Configuration of the model: what is trained, independent of who trains it and how privately."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from conclave.base.frozen import Frozen
from conclave.model.attention.config import AttentionConfig, LatentConfig
from conclave.model.encoders.config import BytesConfig, EncoderConfig, ImageConvConfig
from conclave.model.experts.config import ExpertsConfig, HeldExperts
from conclave.model.heads.config import HeadConfig, NextByteConfig
from conclave.model.routers.config import AttentionRouterConfig


class InitConfig(Frozen):
    """Fresh weights are normal with standard deviation ``gain/√fan_in``; one gain per kind of layer.

    ``up`` is the gain of all maps into hidden layers of experts, gates and deeper layers included.
    Clipped gradients make training sensitive to these scales, because they decide how a unit's fixed gradient
    norm is shared between layers. ``experts = "copies"`` starts all experts of a layer from the same weights
    (as in sparse upcycling, arXiv:2212.05055): each then learns from the first round what any of them would, and
    they part as their routers and holders differ.
    """

    younger = frozenset({"conv"})
    conv: float = Field(default=1.0, ge=0.0, le=100.0)
    embed: float = Field(default=1.0, ge=0.0, le=100.0)
    router: float = Field(default=1.0, ge=0.0, le=100.0)
    up: float = Field(default=1.0, ge=0.0, le=100.0)
    down: float = Field(default=1.0, ge=0.0, le=100.0)
    head: float = Field(default=1.0, ge=0.0, le=100.0)
    experts: Literal["independent", "copies"] = "independent"


class ModelConfig(Frozen):
    """A whole model: encoder → blocks with MoE layers → head.

    * ``preset = "moe"``: the first architecture of the family, one block and no attention.
    * ``preset = "deep-moe"``: several blocks without attention, whose experts are deep.
    * ``preset = "transformer"``: ``layers`` blocks of attention and MoE.
    * ``preset = "own"``: the torch module that ``source = "module:function"`` builds, see :mod:`conclave.model.own`.
      Encoder and head say what its records and scores are, ``layers`` and ``experts.routed`` how many experts there
      are; the rest is the function's to use.

    ``norm`` stands before each attention, each MoE layer and the head. No layer but the norm has a bias-like
    parameter. ``width`` is a multiple of 8 because grouped matrix products need rows of 16-byte multiples in fp32
    and bf16 alike.
    """

    younger = frozenset({"source"})

    preset: Literal["moe", "deep-moe", "transformer", "own"] = "moe"
    source: str | None = Field(default=None, pattern=r"^[A-Za-z_][\w.]*:[A-Za-z_][\w.]*$", max_length=200)
    norm: Literal["rms", "none"] = "rms"
    init: InitConfig = InitConfig()
    width: int = Field(ge=8, le=16_384, multiple_of=8)
    layers: int = Field(default=1, ge=1, le=256)
    attention: AttentionConfig | None = None
    encoder: EncoderConfig
    experts: ExpertsConfig
    head: HeadConfig

    @model_validator(mode="after")
    def _fits_together(self) -> ModelConfig:
        if (self.preset == "own") != (self.source is not None):
            raise ValueError(f"model.source must be given for preset own and no other, not for {self.preset}")
        router = self.experts.router
        if isinstance(router, AttentionRouterConfig) and router.heads * router.key_width > self.width:
            raise ValueError(
                f"model.experts.router.heads is {router.heads}, times key_width {router.key_width} "
                f"must be at most the width {self.width}"
            )
        if (self.encoder.kind == "bytes") != (self.head.kind == "next-byte"):
            raise ValueError(
                f"model.head.kind is {self.head.kind}, does not fit the encoder {self.encoder.kind}: "
                "must be classification for images and tables, next-byte for bytes"
            )
        encoder = self.encoder
        if isinstance(encoder, ImageConvConfig) and not encoder.project and encoder.patch_values != self.width:
            raise ValueError(
                f"model.width is {self.width}, must be the {encoder.patch_values} values of a patch "
                "where model.encoder.project is false"
            )
        if self.preset == "own":
            return self
        if self.preset == "transformer":
            self._check_transformer()
        elif self.attention is not None or (self.preset == "moe" and self.layers != 1):
            has = "one layer and no attention" if self.preset == "moe" else "no attention"
            instead = "transformer, or deep-moe for more layers" if self.preset == "moe" else "transformer"
            raise ValueError(f"model.preset {self.preset} has {has}, must be {instead}")
        elif self.preset == "deep-moe":
            self._check_deep()
        if isinstance(self.head, NextByteConfig) and isinstance(self.encoder, BytesConfig):
            self._check_text(self.head, self.encoder)
        return self

    def _check_deep(self) -> None:
        for key, value in (("layers", self.layers), ("experts.depth", self.experts.depth)):
            if value < 2:
                raise ValueError(f"model.{key} is {value}, must be at least 2 for preset deep-moe")

    def _check_transformer(self) -> None:
        if self.attention is None:
            raise ValueError("model.attention is missing, must be given for preset transformer")
        heads = self.attention.heads
        if isinstance(self.attention, LatentConfig):
            if self.width % heads:
                raise ValueError(f"model.attention.heads is {heads}, must divide the width {self.width}")
        elif self.width % (2 * heads):
            raise ValueError(f"model.attention.heads is {heads}, must divide half the width {self.width}")

    def _check_text(self, head: NextByteConfig, encoder: BytesConfig) -> None:
        if self.attention is None:
            raise ValueError(
                f"model.preset is {self.preset}, must be transformer for bytes: without attention no byte sees another"
            )
        if not self.attention.causal:
            raise ValueError(
                "model.attention.causal is false, must be true for head next-byte: it would see its answer"
            )
        if head.after_next and encoder.window < 3:
            raise ValueError(f"model.encoder.window is {encoder.window}, must be at least 3 for model.head.after_next")

    @property
    def causal(self) -> bool:
        """Whether no token may learn of those after it."""
        return self.head.kind == "next-byte" or (self.attention is not None and self.attention.causal)

    @property
    def all_experts(self) -> HeldExperts:
        """The layout of the full model: every layer holds every expert."""
        return {layer: tuple(range(self.experts.routed)) for layer in range(self.layers)}
