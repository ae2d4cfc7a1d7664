"""Heads against loops over examples and positions."""

from __future__ import annotations

import pytest
import torch

from conclave.model.heads.config import ClassificationConfig
from conclave.model.heads.scores import ClassificationHead, NextByteHead, byte_loss


def naive_byte_loss(scores_BTV, text_BT, lengths, ahead):
    found = []
    for scores_TV, text_T, length in zip(scores_BTV, text_BT, lengths, strict=True):
        terms = [
            -scores_TV[at].double().log_softmax(0)[int(text_T[at + ahead])]
            for at in range(len(text_T) - ahead)
            if at + ahead < length
        ]
        found.append(sum(terms) / len(terms) if terms else 0.0)
    return torch.tensor(found, dtype=torch.float32)


@pytest.mark.parametrize("ahead", [1, 2])
@pytest.mark.parametrize("lengths", [None, [6, 3, 1]])
def test_the_loss_of_bytes_is_a_mean_over_those_that_are_there(ahead, lengths):
    text, scores = torch.randint(256, (3, 6), dtype=torch.uint8), torch.randn(3, 6, 256)
    batch = {"text": text} | ({} if lengths is None else {"length": torch.tensor(lengths)})
    found = byte_loss(scores[:, :-ahead], batch, ahead=ahead)
    torch.testing.assert_close(found, naive_byte_loss(scores, text, lengths or [6] * 3, ahead))


def test_the_next_byte_is_one_ahead():
    head, text = NextByteHead(4), torch.randint(256, (2, 5), dtype=torch.uint8)
    scores = head(torch.randn(2, 5, 4)).detach()
    assert scores.shape == (2, 5, 256)
    torch.testing.assert_close(head.loss(scores, {"text": text}), naive_byte_loss(scores, text, [5, 5], 1))


def test_padding_does_not_enter_the_class():
    head = ClassificationHead(ClassificationConfig(classes=3), 4)
    x, present = torch.randn(2, 5, 4), torch.tensor([[1, 1, 0, 0, 0], [1, 1, 1, 1, 1]]).bool()
    by_hand = torch.stack([head.score(x[0, :2].mean(0)), head.score(x[1].mean(0))])
    torch.testing.assert_close(head(x, present), by_hand)
    x[0, 2:] = 1e6
    torch.testing.assert_close(head(x, present), by_hand)
    label = torch.tensor([2, 0])
    loss = head.loss(by_hand, {"label": label})
    torch.testing.assert_close(loss, -by_hand.log_softmax(1)[torch.arange(2), label])
