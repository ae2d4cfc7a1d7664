"""Modality encoders: from raw values to tokens [B, T, D]."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from conclave.base.errors import BadInputError
from conclave.model.encoders.config import BytesConfig, ImageConfig, ImageConvConfig, ImagePatchConfig, TableConfig
from conclave.model.layers.elementwise import Scale
from conclave.model.layers.padding import only_present


class PositionTable(nn.Module):
    """Adds a learned vector per position."""

    def __init__(self, tokens: int, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(tokens, width))

    def forward(self, x_BTD: Tensor) -> Tensor:
        """Return ``x_BTD`` plus the table."""
        return x_BTD + self.weight


def _standard(image_BCHW: Tensor, config: ImageConfig) -> Tensor:
    """Return ``(image − center)/scale``.

    Raises:
        BadInputError: the images are not [B, channels, height, width] as configured.
    """
    if image_BCHW.shape[1:] != (config.channels, config.height, config.width):
        raise BadInputError(
            f"images of shape {list(image_BCHW.shape[1:])} (channels, height, width), "
            f"must be {[config.channels, config.height, config.width]}"
        )
    return (image_BCHW - config.center) / config.scale


def _max_pool(x_BCHW: Tensor, pool: int, stride: int) -> Tensor:
    """Pool with channels innermost, where torch's forward kernel for the CPU takes a sixth of the time; same values."""
    pooled_BCHW = nn.functional.max_pool2d(x_BCHW.contiguous(memory_format=torch.channels_last), pool, stride)
    return pooled_BCHW.contiguous()


class ImagePatchEncoder(nn.Module):
    """Patches of an image, each mapped linearly to one token."""

    def __init__(self, config: ImagePatchConfig, width: int) -> None:
        super().__init__()
        self.config = config
        self.embed = nn.Linear(config.patch_values, width, bias=False)
        self.position = PositionTable(config.token_count, width) if config.token_count > 1 else None

    def forward(self, image_BCHW: Tensor, present_BT: Tensor | None = None) -> Tensor:
        """Return tokens [B, T, D] in reading order, exact zeros at padding.

        Raises:
            BadInputError: the images are not [B, channels, height, width] as configured.
        """
        standard_BCHW = _standard(image_BCHW, self.config)
        patch_BVT = nn.functional.unfold(standard_BCHW, kernel_size=self.config.patch, stride=self.config.patch)
        # Padding is left out before the linear map: its gradient must not see what padding holds either.
        x_BTD: Tensor = self.embed(only_present(patch_BVT.transpose(1, 2), present_BT))
        if self.position is not None:
            x_BTD = self.position(x_BTD)
        return only_present(x_BTD, present_BT)


class ImageConvEncoder(nn.Module):
    """Convolutions with tanh and max-pooling, then patches of the last map; each is one token, or mapped to one.

    Tanh, because clipped and noised steps are steadier where activations are bounded (Papernot et al. 2021,
    arXiv:2007.14191).
    """

    def __init__(self, config: ImageConvConfig, width: int) -> None:
        super().__init__()
        self.config = config
        channels = [config.channels, *(layer.channels for layer in config.layers)]
        self.convolutions = nn.ModuleList(
            nn.Conv2d(before, layer.channels, layer.kernel, layer.stride, layer.padding, bias=False)
            for before, layer in zip(channels, config.layers, strict=False)
        )
        self.embed = nn.Linear(config.patch_values, width, bias=False) if config.project else None
        self.position = PositionTable(config.token_count, width) if config.token_count > 1 else None

    def forward(self, image_BCHW: Tensor, present_BT: Tensor | None = None) -> Tensor:
        """Return tokens [B, T, D] in reading order of the map.

        Raises:
            BadInputError: the images are not [B, channels, height, width] as configured; there is padding, which a
                convolution would mix with its neighbours.
        """
        if present_BT is not None:
            raise BadInputError(
                "model.encoder.kind is image-conv, must be another for examples with a length: "
                "a convolution does not tell padding from tokens"
            )
        x_BCHW = _standard(image_BCHW, self.config)
        for layer, convolution in zip(self.config.layers, self.convolutions, strict=True):
            x_BCHW = torch.tanh(convolution(x_BCHW))
            if layer.pool > 1 or layer.pool_stride > 1:
                x_BCHW = _max_pool(x_BCHW, layer.pool, layer.pool_stride)
        patch_BVT = nn.functional.unfold(x_BCHW, kernel_size=self.config.patch, stride=self.config.patch)
        x_BTD: Tensor = patch_BVT.transpose(1, 2)
        if self.embed is not None:
            x_BTD = self.embed(x_BTD)
        return x_BTD if self.position is None else self.position(x_BTD)


class ByteEncoder(nn.Module):
    """A table of 256 vectors; each byte is one token. Positions are the attention's business."""

    def __init__(self, config: BytesConfig, width: int) -> None:
        super().__init__()
        self.config = config
        self.table = nn.Embedding(256, width)

    def forward(self, text_BT: Tensor, present_BT: Tensor | None = None) -> Tensor:
        """Return tokens [B, T, D] for bytes given as integers 0 to 255; T may be below the window.

        Padding may be any integer; its tokens are exact zeros.

        Raises:
            BadInputError: more bytes than the window holds, or not a batch of byte rows.
        """
        if text_BT.ndim != 2 or text_BT.shape[1] > self.config.window:
            raise BadInputError(f"text of shape {list(text_BT.shape)}, must be [batch, at most {self.config.window}]")
        byte_BT = text_BT.long() if present_BT is None else torch.where(present_BT, text_BT.long(), 0)
        return only_present(self.table(byte_BT), present_BT)


def _check_rows(table_BF: Tensor, config: TableConfig) -> None:
    if table_BF.ndim != 2 or table_BF.shape[1] != config.features:
        raise BadInputError(f"rows of shape {list(table_BF.shape[1:])}, must be [{config.features}] (features)")


class RowEncoder(nn.Module):
    """A row of numbers, mapped linearly to one token."""

    def __init__(self, config: TableConfig, width: int) -> None:
        super().__init__()
        self.config = config
        self.embed = nn.Linear(config.features, width, bias=False)

    def forward(self, table_BF: Tensor, present_BT: Tensor | None = None) -> Tensor:
        """Return tokens [B, 1, D], exact zeros at padding.

        Raises:
            BadInputError: the rows are not [B, features] as configured.
        """
        _check_rows(table_BF, self.config)
        return only_present(self.embed(only_present(table_BF.unsqueeze(1), present_BT)), present_BT)


class FeatureEncoder(nn.Module):
    """A token for each number of a row: its value times a learned vector, plus a learned position."""

    def __init__(self, config: TableConfig, width: int) -> None:
        super().__init__()
        self.config = config
        self.vectors = Scale(config.features, width)
        self.position = PositionTable(config.features, width)

    def forward(self, table_BF: Tensor, present_BT: Tensor | None = None) -> Tensor:
        """Return tokens [B, T, D] in the order of the features, exact zeros at padding.

        Raises:
            BadInputError: the rows are not [B, features] as configured.
        """
        _check_rows(table_BF, self.config)
        x_BTD: Tensor = self.vectors(only_present(table_BF.unsqueeze(2), present_BT))
        return only_present(self.position(x_BTD), present_BT)
