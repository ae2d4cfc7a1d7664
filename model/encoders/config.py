"""Configuration of the encoders: what records look like, and how they become tokens."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from pydantic import Field, model_validator

from conclave.base.frozen import Frozen


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
    :func:`conclave.model.encoders.oriented_filters.oriented_filters`, of the norm that random ones have on average. It
    is trained either way.
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


ImageConfig = ImagePatchConfig | ImageConvConfig


EncoderConfig = Annotated[ImageConfig | BytesConfig | TableConfig, Field(discriminator="kind")]
