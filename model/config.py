"""Configuration of the model: what is trained, independent of who trains it and how privately."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from model.frozen import Frozen as Frozen
from model.router_config import AttentionRouterConfig, HierarchicalRouterConfig, RouterConfig, SoftmaxRouterConfig


class ImagePatchConfig(Frozen):
    """Cut an image into square patches; each patch is one token.

    ``patch`` must divide both sides. ``height == width == patch`` gives a single token. Values enter as
    ``(value − center)/scale``: public constants, never statistics of private records.
    """

    kind: Literal["image-patch"] = "image-patch"
    height: int = Field(ge=1, le=4096)
    width: int = Field(ge=1, le=4096)
    channels: int = Field(default=1, ge=1, le=64)
    patch: int = Field(ge=1, le=4096)
    center: float = Field(default=0.0, ge=-1e6, le=1e6)
    scale: float = Field(default=1.0, gt=0.0, le=1e6)

    @model_validator(mode="after")
    def _patch_divides(self) -> ImagePatchConfig:
        if self.height % self.patch or self.width % self.patch:
            raise ValueError(f"patch is {self.patch}, must divide the image sides {self.height} and {self.width}")
        return self

    @property
    def tokens(self) -> int:
        """Tokens per image."""
        return (self.height // self.patch) * (self.width // self.patch)

    @property
    def patch_values(self) -> int:
        """Values in one patch."""
        return self.channels * self.patch * self.patch


class BytesConfig(Frozen):
    """Text as bytes: each byte of a window of ``window`` bytes is one token."""

    kind: Literal["bytes"] = "bytes"
    window: int = Field(ge=2, le=65_536)

    @property
    def tokens(self) -> int:
        """Tokens per window."""
        return self.window


class ClassificationConfig(Frozen):
    """Predict one of ``classes`` labels from the mean over tokens; loss is cross-entropy."""

    kind: Literal["classification"] = "classification"
    classes: int = Field(ge=2, le=1_000_000)


class NextByteConfig(Frozen):
    """Predict each next byte from those before it; the loss of a window is the mean over its positions."""

    kind: Literal["next-byte"] = "next-byte"


EncoderConfig = Annotated[ImagePatchConfig | BytesConfig, Field(discriminator="kind")]
HeadConfig = Annotated[ClassificationConfig | NextByteConfig, Field(discriminator="kind")]


class AttentionConfig(Frozen):
    """Causal multi-head attention with rotary positions (RoPE, Su et al. 2021, arXiv:2104.09864)."""

    heads: int = Field(ge=1, le=256)
    rope_base: float = Field(default=10_000.0, gt=1.0, le=1e9)


class ExpertsConfig(Frozen):
    """The routed and shared experts of every MoE layer.

    ``top_k`` experts are active per token. ``balance`` weighs the per-example load-balancing loss;
    being per example, it never couples two units (a batch-wide loss would raise the sensitivity).
    """

    routed: int = Field(ge=1, le=4096)
    shared: int = Field(default=0, ge=0, le=64)
    hidden: int = Field(ge=8, le=65_536, multiple_of=8)
    top_k: int = Field(default=2, ge=1)
    activation: Literal["gelu", "relu", "tanh"] = "gelu"
    balance: float = Field(default=0.01, ge=0.0, le=10.0)
    router: RouterConfig = SoftmaxRouterConfig()

    @model_validator(mode="after")
    def _top_k_exists(self) -> ExpertsConfig:
        if self.top_k > self.routed:
            raise ValueError(f"top_k is {self.top_k}, must be at most the {self.routed} routed experts")
        if isinstance(self.router, HierarchicalRouterConfig):
            self.router.check_fits(self.routed, self.top_k)
        return self


class InitConfig(Frozen):
    """Fresh weights are normal with standard deviation ``gain/√fan_in``; one gain per kind of layer.

    Clipped gradients make training sensitive to these scales, because they decide how a unit's fixed gradient
    norm is shared between layers. ``experts = "copies"`` starts all experts of a layer from the same weights
    (as in sparse upcycling, arXiv:2212.05055): each then learns from the first round what any of them would, and
    they part as their routers and holders differ.
    """

    embed: float = Field(default=1.0, ge=0.0, le=100.0)
    router: float = Field(default=1.0, ge=0.0, le=100.0)
    up: float = Field(default=1.0, ge=0.0, le=100.0)
    down: float = Field(default=1.0, ge=0.0, le=100.0)
    head: float = Field(default=1.0, ge=0.0, le=100.0)
    experts: Literal["independent", "copies"] = "independent"


class ModelConfig(Frozen):
    """A whole model: encoder → blocks with MoE layers → head.

    * ``preset = "moe"``: the first architecture of the family, one block and no attention.
    * ``preset = "transformer"``: ``layers`` blocks of causal attention and MoE.

    ``norm`` stands before each attention, each MoE layer and the head. No layer but the norm has a bias-like
    parameter. ``width`` is a multiple of 8 because grouped matrix products need rows of 16-byte multiples in fp32
    and bf16 alike.
    """

    preset: Literal["moe", "transformer"] = "moe"
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
        if self.preset == "moe" and (self.layers != 1 or self.attention is not None):
            raise ValueError("model.preset moe has one layer and no attention, must be transformer for more")
        if self.preset == "transformer":
            if self.attention is None:
                raise ValueError("model.attention is missing, must be given for preset transformer")
            if self.width % (2 * self.attention.heads):
                raise ValueError(
                    f"model.attention.heads is {self.attention.heads}, must divide half the width {self.width}"
                )
        router = self.experts.router
        if isinstance(router, AttentionRouterConfig) and router.heads * router.key_width > self.width:
            raise ValueError(
                f"model.experts.router.heads is {router.heads}, times key_width {router.key_width} "
                f"must be at most the width {self.width}"
            )
        if (self.encoder.kind == "bytes") != (self.head.kind == "next-byte"):
            raise ValueError(
                f"model.head.kind is {self.head.kind}, does not fit the encoder {self.encoder.kind}: "
                "must be classification for image-patch, next-byte for bytes"
            )
        if self.head.kind == "next-byte" and self.preset == "moe":
            raise ValueError(
                "model.preset is moe, must be transformer for bytes: without attention no byte sees another"
            )
        return self

    @property
    def causal(self) -> bool:
        """Whether no token may learn of those after it."""
        return self.attention is not None or self.head.kind == "next-byte"

    @property
    def all_experts(self) -> HeldExperts:
        """The layout of the full model: every layer holds every expert."""
        return {layer: tuple(range(self.experts.routed)) for layer in range(self.layers)}


HeldExperts = dict[int, tuple[int, ...]]
"""Layer → global ids of the routed experts present, ascending. Position in the tuple is the local index."""
