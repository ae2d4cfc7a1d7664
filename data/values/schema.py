"""What records look like; public. A schema says whether a model fits."""

from __future__ import annotations

from dataclasses import dataclass

from conclave.model.config import ModelConfig
from conclave.model.encoders.config import BytesConfig, ImageConvConfig, ImagePatchConfig, TableConfig
from conclave.model.heads.config import ClassificationConfig


@dataclass(frozen=True)
class ImageSchema:
    """``image`` float [channels, height, width] with a ``label`` below ``classes``."""

    image: tuple[int, int, int]
    classes: int

    def mismatch(self, model: ModelConfig) -> str | None:
        """Return what is wrong with a model for these records, as the end of a sentence; None if it fits."""
        encoder, head = model.encoder, model.head
        if not (isinstance(encoder, ImagePatchConfig | ImageConvConfig) and isinstance(head, ClassificationConfig)):
            return "model.encoder.kind must be image-patch or image-conv and model.head.kind classification"
        image = (encoder.channels, encoder.height, encoder.width)
        if image != self.image:
            return f"model.encoder describes images {image}, must be {self.image} (channels, height, width)"
        if head.classes != self.classes:
            return f"model.head.classes is {head.classes}, must be {self.classes}"
        return None


@dataclass(frozen=True)
class TextSchema:
    """``text`` uint8 [window]."""

    window: int

    def mismatch(self, model: ModelConfig) -> str | None:
        """Return what is wrong with a model for these records; see :class:`ImageSchema`."""
        if not isinstance(model.encoder, BytesConfig):
            return "model.encoder.kind must be bytes"
        if model.encoder.window != self.window:
            return f"model.encoder.window is {model.encoder.window}, must be the data's window {self.window}"
        return None


@dataclass(frozen=True)
class TableSchema:
    """``table`` float [features] with a ``label`` below ``classes``."""

    features: int
    classes: int

    def mismatch(self, model: ModelConfig) -> str | None:
        """Return what is wrong with a model for these records; see :class:`ImageSchema`."""
        encoder, head = model.encoder, model.head
        if not (isinstance(encoder, TableConfig) and isinstance(head, ClassificationConfig)):
            return "model.encoder.kind must be table and model.head.kind classification"
        if encoder.features != self.features:
            return f"model.encoder.features is {encoder.features}, must be {self.features}"
        if head.classes != self.classes:
            return f"model.head.classes is {head.classes}, must be {self.classes}"
        return None


Schema = ImageSchema | TextSchema | TableSchema
