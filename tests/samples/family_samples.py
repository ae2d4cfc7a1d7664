"""Small models, one for each member of the family that a configuration can ask for."""

from __future__ import annotations

from conftest import make_batch, make_config, make_table, make_text, make_text_config

from conclave.model.config import ModelConfig
from conclave.model.records import Batch

LATENT = {"kind": "latent", "heads": 2, "kv_rank": 6, "rope_width": 4}


def make_deep_config(*, layers: int = 2, **experts) -> ModelConfig:
    """A small deep-moe: images in four patches, experts with two hidden layers."""
    document = make_config(**{"depth": 2} | experts).model_dump() | {"preset": "deep-moe", "layers": layers}
    return ModelConfig.model_validate(document)


def make_image_transformer(attention: dict) -> ModelConfig:
    document = make_config(balance=0.0).model_dump() | {"preset": "transformer", "layers": 2, "attention": attention}
    return ModelConfig.model_validate(document)


def make_conv_config(patch: int, *, channels: int = 5, project: bool = True, **experts) -> ModelConfig:
    """Two convolutions over 8×8 images, with strides, padding and pooling; a last map of 4×4."""
    first = {"channels": 3, "kernel": 4, "padding": 2, "pool": 3, "pool_stride": 2}  # to 9×9, to 4×4
    layers = [first, {"channels": channels, "kernel": 4, "stride": 1, "padding": 2, "pool": 2}]  # to 5×5, to 4×4
    encoder = {"kind": "image-conv", "height": 8, "width": 8, "layers": layers, "patch": patch, "center": 0.3}
    encoder["project"] = project
    return ModelConfig.model_validate(make_config(**experts).model_dump() | {"encoder": encoder})


def make_table_config(tokens: str, **changes) -> ModelConfig:
    """Rows of seven numbers, as one token or as seven."""
    encoder = {"kind": "table", "features": 7, "tokens": tokens}
    return ModelConfig.model_validate(make_config().model_dump() | {"encoder": encoder} | changes)


def examples_for(config: ModelConfig, examples: int) -> Batch:
    """Examples of the kind that a small model takes."""
    make = {"text": make_text, "image": make_batch, "table": make_table}[config.encoder.modality]
    return make(examples)


FEATURES_ATTEND = {"preset": "transformer", "layers": 2, "attention": {"heads": 2, "causal": False}}

FAMILY = {
    "convolutions, one token": make_conv_config(patch=4, activation="tanh"),
    "convolutions, four tokens": make_conv_config(patch=2),
    "convolutions, no projection": make_conv_config(patch=2, channels=4, project=False, activation="tanh"),
    "latent": make_text_config(attention=LATENT),
    "latent, low-rank queries": make_text_config(attention=LATENT | {"query_rank": 6}),
    "latent without norms": make_text_config(attention=LATENT | {"query_rank": 6}, norm="none"),
    "latent, both ways": make_image_transformer(LATENT | {"causal": False}),
    "multi-head, both ways": make_image_transformer({"heads": 2, "causal": False}),
    "after next": make_text_config(head={"kind": "next-byte", "after_next": 0.5}),
    "after next, latent": make_text_config(attention=LATENT, head={"kind": "next-byte", "after_next": 0.5}),
    "gated": make_config(activation="swiglu"),
    "deep": make_config(depth=3),
    "deep-moe, gated": make_deep_config(activation="swiglu"),
    "table, one token": make_table_config("row"),
    "table, a token for each feature": make_table_config("feature"),
    "table, features that attend": make_table_config("feature", **FEATURES_ATTEND),
    "fine-grained, gated": make_config(routed=24, top_k=8, hidden=8, activation="swiglu", shared=2),
}
