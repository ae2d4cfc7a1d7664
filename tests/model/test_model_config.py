"""Configuration: checked at construction, immutable, unknown keys refused."""

from __future__ import annotations

import copy

import pytest
from conftest import make_config, make_text_config
from family_samples import FAMILY
from pydantic import ValidationError

from conclave.model.config import ModelConfig

GOOD = make_config().model_dump()


def changed(key, value):
    document = copy.deepcopy(GOOD)
    *parents, last = key.split(".")
    table = document
    for parent in parents:
        table = table[parent]
    table[last] = value
    return document


def test_the_good_document_is_good():
    assert ModelConfig.model_validate(GOOD) == make_config()


@pytest.mark.parametrize(
    ("key", "value", "sentence"),
    [
        ("encoder.patch", 3, "patch is 3, must divide the image sides 8 and 8"),
        ("encoder.width", 6, "patch is 4, must divide the image sides 8 and 6"),
        ("experts.top_k", 7, "top_k is 7, must be at most the 6 routed experts"),
        ("experts.top_k", 0, "greater than or equal to 1"),
        ("experts.hidden", 12, "multiple of 8"),
        ("experts.balance", -0.1, "greater than or equal to 0"),
        ("experts.balance", float("nan"), "finite"),
        ("experts.activation", "swish", "'gelu', 'relu', 'tanh' or 'swiglu'"),
        ("width", 12, "multiple of 8"),
        ("width", 0, "greater than or equal to 8"),
        ("width", "wide", "valid integer"),
        ("head.classes", 1, "greater than or equal to 2"),
        ("norm", "batch", "'rms' or 'none'"),
        ("experts.capacity", 3, "Extra inputs are not permitted"),
        ("novelty", 3, "Extra inputs are not permitted"),
        ("encoder.stride", 3, "Extra inputs are not permitted"),
    ],
)
def test_what_does_not_fit_is_refused_with_what_is_allowed(key, value, sentence):
    with pytest.raises(ValidationError) as caught:
        ModelConfig.model_validate(changed(key, value))
    assert len(caught.value.errors()) == 1
    assert sentence in str(caught.value)


@pytest.mark.parametrize(
    ("key", "value"),
    [("encoder.patch", 8), ("encoder.patch", 1), ("experts.top_k", 6), ("width", 8), ("experts.hidden", 8)],
)
def test_the_bounds_themselves_are_allowed(key, value):
    ModelConfig.model_validate(changed(key, value))


def test_configuration_cannot_be_changed(config):
    for table, key in ((config, "width"), (config.experts, "top_k"), (config.encoder, "patch")):
        with pytest.raises(ValidationError, match="frozen"):
            setattr(table, key, 8)


def test_json_keeps_every_field(config):
    assert ModelConfig.model_validate_json(config.model_dump_json()) == config


@pytest.mark.parametrize(("patch", "tokens", "values"), [(8, 1, 64), (4, 4, 16), (2, 16, 4), (1, 64, 1)])
def test_token_counts(patch, tokens, values):
    encoder = ModelConfig.model_validate(changed("encoder.patch", patch)).encoder
    assert (encoder.token_count, encoder.patch_values) == (tokens, values)


def test_all_experts_names_each_once(config):
    assert config.all_experts == {0: (0, 1, 2, 3, 4, 5)}


def test_what_asks_for_nothing_new_is_hashed_as_before_there_was_anything_new():
    assert make_text_config().json_for_hash() == (
        '{"preset":"transformer","norm":"rms","init":{"embed":1.0,"router":1.0,"up":1.0,"down":1.0,"head":1.0,'
        '"experts":"independent"},"width":16,"layers":2,"attention":{"heads":2,"rope_base":10000.0},'
        '"encoder":{"kind":"bytes","window":12},"experts":{"routed":4,"shared":1,"hidden":8,"top_k":2,'
        '"activation":"gelu","balance":0.1},"head":{"kind":"next-byte"}}'
    )


@pytest.mark.parametrize("name", FAMILY)
def test_what_is_hashed_still_says_everything(name):
    assert ModelConfig.model_validate_json(FAMILY[name].json_for_hash()) == FAMILY[name]
