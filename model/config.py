"""Configuration of the model: what is trained, independent of who trains it and how privately."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator


class Frozen(BaseModel):
    """Base of every configuration: immutable; an unknown key is an error, and a value is never converted."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)


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


class ClassificationConfig(Frozen):
    """Predict one of ``classes`` labels from the mean over tokens; loss is cross-entropy."""

    kind: Literal["classification"] = "classification"
    classes: int = Field(ge=2, le=1_000_000)


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

    @model_validator(mode="after")
    def _top_k_exists(self) -> ExpertsConfig:
        if self.top_k > self.routed:
            raise ValueError(f"top_k is {self.top_k}, must be at most the {self.routed} routed experts")
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
    """A whole model: encoder → blocks with MoE layers → pooling → head.

    ``preset = "moe"`` is the first architecture of the family: one block, no attention.
    ``norm`` stands before each MoE layer and before the head. No layer but the norm has a bias-like parameter.
    ``width`` is a multiple of 8 because grouped matrix products need rows of 16-byte multiples in
    fp32 and bf16 alike.
    """

    preset: Literal["moe"] = "moe"
    norm: Literal["rms", "none"] = "rms"
    init: InitConfig = InitConfig()
    width: int = Field(ge=8, le=16_384, multiple_of=8)
    encoder: ImagePatchConfig
    experts: ExpertsConfig
    head: ClassificationConfig

    @property
    def layers(self) -> int:
        """Number of blocks, each with one MoE layer."""
        return 1

    @property
    def all_experts(self) -> HeldExperts:
        """The layout of the full model: every layer holds every expert."""
        return {layer: tuple(range(self.experts.routed)) for layer in range(self.layers)}


HeldExperts = dict[int, tuple[int, ...]]
"""Layer → global ids of the routed experts present, ascending. Position in the tuple is the local index."""
