"""Configuration of the model: what is trained, independent of who trains it and how privately."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

from pydantic import BeforeValidator, Field, model_validator

from model.frozen import Frozen as Frozen
from model.router_config import AttentionRouterConfig, HierarchicalRouterConfig, RouterConfig, SoftmaxRouterConfig


class ImagePatchConfig(Frozen):
    """Cut an image into square patches; each patch is one token.

    ``patch`` must divide both sides. ``height == width == patch`` gives a single token. Values enter as
    ``(value − center)/scale``: public constants, never statistics of private records.
    """

    modality: ClassVar[str] = "image"
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
    def token_count(self) -> int:
        """Tokens per image."""
        return (self.height // self.patch) * (self.width // self.patch)

    @property
    def patch_values(self) -> int:
        """Values in one patch."""
        return self.channels * self.patch * self.patch


class ConvolutionConfig(Frozen):
    """One convolution: ``channels`` filters of ``kernel`` × ``kernel`` values, every ``stride`` pixels; then tanh.

    ``padding`` rows and columns of zeros (after centring) stand around the image. Then the largest of every
    ``pool`` × ``pool`` values is taken, every ``pool_stride`` positions; with 1 and 1 nothing is pooled.
    """

    channels: int = Field(ge=1, le=4096)
    kernel: int = Field(ge=1, le=64)
    stride: int = Field(default=1, ge=1, le=64)
    padding: int = Field(default=0, ge=0, le=63)
    pool: int = Field(default=1, ge=1, le=64)
    pool_stride: int = Field(default=1, ge=1, le=64)

    @model_validator(mode="after")
    def _padding_below_kernel(self) -> ConvolutionConfig:
        if self.padding >= self.kernel:
            raise ValueError(f"padding is {self.padding}, must be below the kernel {self.kernel}")
        return self

    def side_after(self, side: int) -> int:
        """Return the length of a side afterwards, 0 or less where the kernel or the pool does not fit."""
        convolved = (side + 2 * self.padding - self.kernel) // self.stride + 1
        return (convolved - self.pool) // self.pool_stride + 1


class ImageConvConfig(Frozen):
    """Convolutions, each with tanh and max-pooling, then patches of what they make of the image; each is one token.

    ``patch`` must divide both sides of the last map; one patch as large as the map gives a single token. A patch is
    mapped linearly to the model's width, or, with ``project = false``, is the token: fewer shared weights. Values enter
    as ``(value − center)/scale``: public constants, never statistics of private records.

    ``filters``: where the first convolution starts, at random filters or at those of
    :func:`model.oriented_filters.oriented_filters`, of the norm that random ones have on average. It is trained either
    way.
    """

    younger = frozenset({"filters"})

    modality: ClassVar[str] = "image"
    kind: Literal["image-conv"] = "image-conv"
    height: int = Field(ge=1, le=4096)
    width: int = Field(ge=1, le=4096)
    channels: int = Field(default=1, ge=1, le=64)
    layers: Annotated[tuple[ConvolutionConfig, ...], Field(strict=False, min_length=1, max_length=8)]
    patch: int = Field(ge=1, le=4096)
    project: bool = True
    filters: Literal["random", "oriented"] = "random"
    center: float = Field(default=0.0, ge=-1e6, le=1e6)
    scale: float = Field(default=1.0, gt=0.0, le=1e6)

    @model_validator(mode="after")
    def _fits_together(self) -> ImageConvConfig:
        if self.filters == "oriented" and self.layers[0].kernel < 3:
            raise ValueError(f"layers.0.kernel is {self.layers[0].kernel}, must be at least 3 with filters 'oriented'")
        height, width = self.height, self.width
        for number, layer in enumerate(self.layers):
            most = min(height, width) + 2 * layer.padding
            if layer.kernel > most:
                raise ValueError(f"layers.{number}.kernel is {layer.kernel}, must be at most the padded side {most}")
            height, width = layer.side_after(height), layer.side_after(width)
            if min(height, width) < 1:
                raise ValueError(f"layers.{number}.pool is {layer.pool}, must be at most what the convolution leaves")
        if height % self.patch or width % self.patch:
            raise ValueError(f"patch is {self.patch}, must divide the sides {height} and {width} of the last map")
        return self

    @property
    def map_sides(self) -> tuple[int, int]:
        """Height and width of the last map."""
        height, width = self.height, self.width
        for layer in self.layers:
            height, width = layer.side_after(height), layer.side_after(width)
        return height, width

    @property
    def token_count(self) -> int:
        """Tokens per image."""
        height, width = self.map_sides
        return (height // self.patch) * (width // self.patch)

    @property
    def patch_values(self) -> int:
        """Values in one patch of the last map."""
        return self.layers[-1].channels * self.patch * self.patch


class BytesConfig(Frozen):
    """Text as bytes: each byte of a window of ``window`` bytes is one token."""

    modality: ClassVar[str] = "text"
    kind: Literal["bytes"] = "bytes"
    window: int = Field(ge=2, le=65_536)

    @property
    def token_count(self) -> int:
        """Tokens per window."""
        return self.window


class TableConfig(Frozen):
    """A row of ``features`` numbers, which are to come standardised, by public constants.

    ``tokens = "row"``: the row, mapped linearly, is one token. ``tokens = "feature"``: each feature is one, its value
    times a learned vector plus a learned position, so that attention sees which features go together.
    """

    modality: ClassVar[str] = "table"
    kind: Literal["table"] = "table"
    features: int = Field(ge=1, le=65_536)
    tokens: Literal["row", "feature"] = "row"

    @property
    def token_count(self) -> int:
        """Tokens per row."""
        return 1 if self.tokens == "row" else self.features


class ClassificationConfig(Frozen):
    """Predict one of ``classes`` labels from the mean over tokens; loss is cross-entropy."""

    kind: Literal["classification"] = "classification"
    classes: int = Field(ge=2, le=1_000_000)


class NextByteConfig(Frozen):
    """Predict each next byte from those before it; the loss of a window is the mean over its positions.

    ``after_next``: weight λ of a second task in training, predicting the byte after next from the token and the next
    byte (multi-token prediction of depth 1, DeepSeek-V3, arXiv:2412.19437, §2.2). Nothing else uses its layers; with 0
    there are none.
    """

    younger = frozenset({"after_next"})
    kind: Literal["next-byte"] = "next-byte"
    after_next: float = Field(default=0.0, ge=0.0, le=10.0)


ImageConfig = ImagePatchConfig | ImageConvConfig
EncoderConfig = Annotated[ImageConfig | BytesConfig | TableConfig, Field(discriminator="kind")]
HeadConfig = Annotated[ClassificationConfig | NextByteConfig, Field(discriminator="kind")]


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
    queries; not given, they are made from the token itself. ``rope_width``: rotated coordinates of each head's query,
    and of the one rotated key that all heads share. Beside these, a head is as wide as in multi-head attention.
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


class ExpertsConfig(Frozen):
    """The routed and shared experts of every MoE layer.

    ``top_k`` experts are active per token. An expert has ``depth`` hidden layers of ``hidden`` values. Activation
    ``swiglu`` has two maps into each hidden layer, ``silu(gate) · up`` (Shazeer 2020, arXiv:2002.05202), and so half
    as many parameters again. Fine-grained experts (DeepSeekMoE, arXiv:2401.06066) are nothing of their own: 4 times as
    many, a quarter as wide, 4 times the ``top_k``. The shared experts are one network, ``shared`` times as wide.

    ``balance`` weighs the per-example load-balancing loss; being per example, it never couples two units (a
    batch-wide loss would raise the sensitivity).
    """

    younger = frozenset({"depth", "router"})
    routed: int = Field(ge=1, le=4096)
    shared: int = Field(default=0, ge=0, le=64)
    hidden: int = Field(ge=8, le=65_536, multiple_of=8)
    depth: int = Field(default=1, ge=1, le=16)
    top_k: int = Field(default=2, ge=1)
    activation: Literal["gelu", "relu", "tanh", "swiglu"] = "gelu"
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
    * ``preset = "own"``: the torch module that ``source = "module:function"`` builds, see :mod:`model.own`. Encoder and
      head say what its records and scores are, ``layers`` and ``experts.routed`` how many experts there are; the rest
      is the function's to use.

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


HeldExperts = dict[int, tuple[int, ...]]
"""Layer → global ids of the routed experts present, ascending. Position in the tuple is the local index."""
