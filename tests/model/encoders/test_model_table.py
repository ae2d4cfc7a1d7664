"""Tables: rows of numbers as one token or as one for each feature."""

from __future__ import annotations

import pytest
import torch
from conftest import make_config, make_table, make_text_config
from family_samples import FEATURES_ATTEND, make_conv_config, make_table_config
from pydantic import ValidationError

from conclave.base.errors import BadInputError
from conclave.data.values.schema import ImageSchema, TableSchema, TextSchema
from conclave.model.building import build
from conclave.model.config import ModelConfig
from conclave.model.costs import costs_of


def test_a_row_is_a_sum_of_weighted_columns():
    encoder = build(make_table_config("row"), seed=3).encoder
    table = make_table(4)["table"]
    tokens = encoder(table)
    assert tokens.shape == (4, 1, 16)
    for b in range(4):
        expected = sum(table[b, f] * encoder.embed.weight[:, f] for f in range(7))
        torch.testing.assert_close(tokens[b, 0], expected)


def test_a_feature_is_its_value_times_a_vector_plus_a_position():
    encoder = build(make_table_config("feature"), seed=3).encoder
    table = make_table(4)["table"]
    tokens = encoder(table)
    assert tokens.shape == (4, 7, 16)
    for b in range(4):
        for f in range(7):
            expected = table[b, f] * encoder.vectors.weight[f] + encoder.position.weight[f]
            torch.testing.assert_close(tokens[b, f], expected)


@pytest.mark.parametrize("tokens", ["row", "feature"])
def test_gains_of_the_embedding_reach_both(tokens):
    config = make_table_config(tokens)
    larger = config.model_copy(update={"init": config.init.model_copy(update={"embed": 3.0})})
    table = make_table(2)["table"]
    plain, scaled = build(config, seed=3).encoder, build(larger, seed=3).encoder
    position = plain.position.weight if tokens == "feature" else 0.0
    torch.testing.assert_close(scaled(table) - position, 3.0 * (plain(table) - position))


@pytest.mark.parametrize("tokens", ["row", "feature"])
def test_every_size_but_the_models_is_refused(tokens):
    encoder = build(make_table_config(tokens), seed=3).encoder
    for shape in ((2, 6), (2, 8), (7,), (2, 1, 7)):
        with pytest.raises(BadInputError, match=r"must be \[7\] \(features\)"):
            encoder(torch.zeros(shape))


def test_features_that_are_padding_change_nothing():
    config = make_table_config("feature", **FEATURES_ATTEND)
    config = config.model_copy(update={"experts": config.experts.model_copy(update={"balance": 0.0})})
    network = build(config, seed=3).eval()
    batch = make_table(3)
    changed = batch | {"table": batch["table"].clone(), "length": torch.tensor([7, 4, 1])}
    changed["table"][1, 4:] = float("nan")
    changed["table"][2, 1:] = float("inf")
    padded = batch | {"length": changed["length"]}
    assert torch.equal(network.loss(changed), network.loss(padded))
    torch.testing.assert_close(network.loss(changed)[0], network.loss(batch)[0])
    assert not torch.equal(network.loss(changed)[1], network.loss(batch)[1])
    network.loss(changed).sum().backward()
    assert all(p.grad.isfinite().all() for p in network.parameters())


@pytest.mark.parametrize("tokens", ["row", "feature"])
def test_tokens_of_padding_are_exact_zeros(tokens):
    encoder = build(make_table_config(tokens), seed=3).encoder
    table = make_table(2)["table"]
    present = torch.ones(2, encoder.config.token_count, dtype=torch.bool)
    present[1, -1] = False
    found, whole = encoder(table, present), encoder(table)
    assert (found[1, -1] == 0).all()
    assert torch.equal(found[present], whole[present])


@pytest.mark.parametrize("tokens", ["row", "feature"])
def test_made_up_examples_fit_and_costs_are_counted(tokens):
    config = make_table_config(tokens)
    network = build(config, seed=3)
    batch = network.synthetic_batch(5)
    assert batch["table"].shape == (5, 7)
    assert network.loss(batch).shape == (5,)
    assert torch.equal(batch["table"], network.synthetic_batch(5)["table"])
    costs = costs_of(config)
    assert costs.total == sum(p.numel() for p in network.parameters())
    assert costs.flops_per_token > 0


def test_the_default_is_one_token():
    encoder = {"kind": "table", "features": 7}
    config = ModelConfig.model_validate(make_config().model_dump() | {"encoder": encoder})
    assert (config.encoder.tokens, config.encoder.token_count) == ("row", 1)
    assert make_table_config("feature").encoder.token_count == 7


@pytest.mark.parametrize(
    "encoder", [{"features": 0}, {"features": 65_537}, {"features": 7, "tokens": "cell"}, {"features": 7.0}, {}]
)
def test_a_wrong_encoder_is_refused(encoder):
    with pytest.raises(ValidationError, match=r"features|tokens"):
        ModelConfig.model_validate(make_config().model_dump() | {"encoder": {"kind": "table"} | encoder})


def test_a_table_has_no_next_byte():
    with pytest.raises(ValidationError, match="must be classification for images and tables, next-byte for bytes"):
        make_table_config("row", head={"kind": "next-byte"})


def test_schemas_say_which_models_fit():
    table, image, text = TableSchema(7, 5), ImageSchema((1, 8, 8), 5), TextSchema(12)
    for tokens in ("row", "feature"):
        assert table.mismatch(make_table_config(tokens)) is None
    for other in (6, 8):
        assert (
            TableSchema(other, 5).mismatch(make_table_config("row")) == f"model.encoder.features is 7, must be {other}"
        )
    for other in (4, 6):
        assert TableSchema(7, other).mismatch(make_table_config("row")) == f"model.head.classes is 5, must be {other}"
    for other in (make_config(), make_conv_config(patch=4), make_text_config()):
        assert table.mismatch(other) == "model.encoder.kind must be table and model.head.kind classification"
    assert image.mismatch(make_config()) is image.mismatch(make_conv_config(patch=4)) is None
    assert "must be image-patch or image-conv" in image.mismatch(make_table_config("row"))
    assert text.mismatch(make_table_config("row")) == "model.encoder.kind must be bytes"
