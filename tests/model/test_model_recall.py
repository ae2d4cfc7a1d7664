"""The task of the benchmark recall, narrower: attention recalls a byte over 96 tokens, and nothing else does."""

from __future__ import annotations

import pytest
import torch
from conftest import in_the_soak_unless, load_benchmark


@pytest.fixture(scope="module")
def recall():
    return load_benchmark("recall")


def test_the_answer_is_96_tokens_before_the_question(recall):
    text_BT = recall.windows(50, torch.Generator().manual_seed(0))
    question = text_BT.shape[1] - 2
    assert (text_BT[:, question] == ord("?")).all()
    assert torch.equal(text_BT[:, question - 96], text_BT[:, -1])
    capital_BT = (text_BT >= ord("A")) & (text_BT <= ord("P"))
    assert (capital_BT.sum(dim=1) == 2).all()  # it is nowhere else


@pytest.mark.parametrize("attention", in_the_soak_unless(["latent"], ["multi-head", "latent"]))
def test_attention_recalls_it(recall, attention):
    network = recall.make(attention, width=32)
    assert recall.train(network, steps=400, learning_rate=5e-3) < 400
    assert recall.accuracy(network, count=512) >= 0.95


def test_without_attention_it_is_guessed(recall):
    network = recall.make("none", width=32)
    recall.train(network, steps=100, learning_rate=5e-3)
    # 512 guesses at 1/16: mean 32, standard deviation 5.5; five of them above is 60 (false alarm 3e-7, one side).
    assert recall.accuracy(network, count=512) <= 60 / 512
