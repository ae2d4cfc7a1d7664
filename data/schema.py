"""What records look like; public. A schema says whether a model fits."""

from __future__ import annotations

from dataclasses import dataclass

from model.config import BytesConfig, ClassificationConfig, ModelConfig


@dataclass(frozen=True)
class ImageSchema:
    """``image`` float [channels, height, width] with a ``label`` below ``classes``."""

    image: tuple[int, int, int]
    classes: int

    def mismatch(self, model: ModelConfig) -> str | None:
        """Return what is wrong with a model for these records, as the end of a sentence; None if it fits."""
        encoder, head = model.encoder, model.head
        if isinstance(encoder, BytesConfig) or not isinstance(head, ClassificationConfig):
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


Schema = ImageSchema | TextSchema
