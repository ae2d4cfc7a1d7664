"""Modality encoders: from raw values to tokens [B, T, D]."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from model.config import BytesConfig, ImagePatchConfig
from model.errors import BadInputError
from model.padding import only_present


class PositionTable(nn.Module):
    """Adds a learned vector per position."""

    def __init__(self, tokens: int, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(tokens, width))

    def forward(self, x_BTD: Tensor) -> Tensor:
        """Return ``x_BTD`` plus the table."""
        return x_BTD + self.weight


class ImagePatchEncoder(nn.Module):
    """Patches of an image, each mapped linearly to one token."""

    def __init__(self, config: ImagePatchConfig, width: int) -> None:
        super().__init__()
        self.config = config
        self.embed = nn.Linear(config.patch_values, width, bias=False)
        self.position = PositionTable(config.tokens, width) if config.tokens > 1 else None

    def forward(self, image_BCHW: Tensor, present_BT: Tensor | None = None) -> Tensor:
        """Return tokens [B, T, D] in reading order, exact zeros at padding.

        Raises:
            BadInputError: the images are not [B, channels, height, width] as configured.
        """
        c = self.config
        if image_BCHW.shape[1:] != (c.channels, c.height, c.width):
            raise BadInputError(
                f"images of shape {list(image_BCHW.shape[1:])} (channels, height, width), "
                f"must be {[c.channels, c.height, c.width]}"
            )
        standard_BCHW = (image_BCHW - c.center) / c.scale
        patch_BVT = nn.functional.unfold(standard_BCHW, kernel_size=c.patch, stride=c.patch)
        # Padding is left out before the linear map: its gradient must not see what padding holds either.
        x_BTD: Tensor = self.embed(only_present(patch_BVT.transpose(1, 2), present_BT))
        if self.position is not None:
            x_BTD = self.position(x_BTD)
        return only_present(x_BTD, present_BT)


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
