"""The byte after next: the training loss against one written out by hand; nothing but training sees it."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from conftest import make_text, make_text_config
from family_samples import LATENT
from microbatches import alone, relative_error
from naive_models import naive_moe
from torch.func import functional_call

from conclave.base.errors import BadInputError
from conclave.model import parameters
from conclave.model.building import build, from_state
from conclave.model.heads.after_next import AfterNext
from conclave.model.network import Network
from conclave.privacy.bookkeeping import Bookkeeper, Units

EPS = torch.finfo(torch.float64).eps


def make(after_next=0.5, **changes):
    return make_text_config(head={"kind": "next-byte", "after_next": after_next}, **changes)


def rms(x, weight):
    return weight * x / (x.square().mean(-1, keepdim=True) + EPS).sqrt()


def after_next_by_hand(state, layer, x_TD, text):
    """The loss of one text, position by position, in terms of the trunk's tokens."""
    embedded = state["encoder.table.weight"]
    rows = []
    for i in range(len(text) - 2):
        token = rms(x_TD[i], state["after_next.token_norm.weight"])
        byte = rms(embedded[text[i + 1]], state["after_next.byte_norm.weight"])
        rows.append(state["after_next.combine.weight"] @ torch.cat([token, byte]))
    y = torch.stack(rows)
    y = y + layer.attention(rms(y, state["after_next.attention_norm.weight"])[None])[0]  # has its own tests
    terms = []
    for i, row in enumerate(y):
        hidden = state["after_next.feed_forward.up.weight"] @ rms(row, state["after_next.feed_forward_norm.weight"])
        row = row + state["after_next.feed_forward.down.weight"] @ F.gelu(hidden)
        scores = state["head.score.weight"] @ rms(row, state["after_next.norm.weight"])
        terms.append(scores.exp().sum().log() - scores[text[i + 2]])
    return sum(terms) / len(terms)


@pytest.mark.parametrize("weight", [0.5, 2.0])
@pytest.mark.parametrize("attention", [{"heads": 2}, LATENT])
def test_the_loss_equals_the_one_by_hand(attention, weight):
    network = build(make(weight, attention=attention), seed=2).double()
    state, batch = network.state_dict(), make_text(3)
    x = network.encoder(batch["text"])
    aux = 0.0
    for block in network.blocks:
        x = x + block.attention(block.attention_norm(x))
        y, balance = naive_moe(block.moe, block.norm(x), [True] * 4, network.config.experts)
        x, aux = x + y, aux + balance
    losses = network.loss(batch)
    for b in range(3):
        text = batch["text"][b].tolist()
        scores = rms(x[b], state["norm.weight"]) @ state["head.score.weight"].T
        first = sum(scores[t].exp().sum().log() - scores[t, text[t + 1]] for t in range(11)) / 11
        second = after_next_by_hand(state, network.after_next, x[b], text)
        torch.testing.assert_close(losses[b], first + weight * second + 0.1 * aux[b], rtol=1e-9, atol=1e-9)


def test_no_position_sees_the_byte_it_predicts():
    network = build(make(), seed=2)
    x, embedded = torch.randn(2, 12, 16), torch.randn(2, 12, 16)
    before = network.after_next(x, embedded)
    for place in range(12):
        changed = embedded.clone()
        changed[:, place] += 1.0
        moved = (network.after_next(x, changed) - before).abs().amax(dim=(0, 2)) > 1e-6
        # Position i is told bytes up to i + 1; byte 0 is known to the trunk alone, and the last is only predicted.
        assert moved.tolist() == [1 <= place <= 10 and i + 1 >= place for i in range(10)]


def test_predicting_does_not_know_of_it():
    with_it, batch = build(make(), seed=2), make_text(3)
    state = {name: tensor for name, tensor in with_it.state_dict().items() if not name.startswith("after_next.")}
    without = from_state(make(0.0), with_it.held, state)
    a, b = with_it(batch), without(batch)
    assert torch.equal(a.scores, b.scores)
    assert torch.equal(with_it.task_loss(a, batch), without.task_loss(b, batch))


def test_weight_zero_has_no_layers_and_the_weights_of_before():
    plain, none = build(make_text_config(), seed=2), build(make(0.0), seed=2)
    assert plain.state_dict().keys() == none.state_dict().keys()
    with_it = build(make(), seed=2).state_dict()
    assert all(torch.equal(tensor, with_it[name]) for name, tensor in plain.state_dict().items())


def test_its_weights_are_shared_and_travel_to_every_node():
    config = make(attention=LATENT)
    network = build(config, seed=2)
    held = {0: (1, 3), 1: (0,)}
    config_of_few = config.model_copy(update={"experts": config.experts.model_copy(update={"top_k": 1})})
    wire = parameters.split(network.state_dict(), network.held)
    assert "shared/after_next.combine.weight" in wire
    own = {name for name in wire if "after_next" in name}
    assert {parameters.owner(name).group for name in own} == {"shared"}
    assert own <= set(parameters.shapes(config, held))
    part = from_state(config_of_few, held, parameters.join(wire, held))
    assert part.loss(make_text(2)).isfinite().all()


class CalledTwice(Network):
    """As the paper draws it: table and head are layers of both tasks, each called once by each."""

    def _loss_of_both(self, after_next, x_BTD, trunk, batch):
        looked_up = self.encoder.table(batch["text"].long())
        y_BTD = after_next(trunk.x_BTD, looked_up, None)
        scores = self.head(y_BTD)
        second = F.cross_entropy(scores.transpose(1, 2), batch["text"][:, 2:].long(), reduction="none").mean(1)
        return self.head.loss(self.head(x_BTD), batch) + after_next.weight * second


@pytest.mark.parametrize("unit_B", [torch.arange(6), torch.tensor([0, 0, 1, 1, 1, 2])])
def test_one_call_or_two_the_units_gradients_are_the_same(unit_B):
    once = build(make(), seed=2)
    twice = CalledTwice(once.config, once.held)
    twice.load_state_dict(once.state_dict())
    batch, count = make_text(6), int(unit_B.max()) + 1
    weight_B = 1.0 / torch.bincount(unit_B)[unit_B]
    truths = [alone(n, n.loss, batch, unit_B) for n in (once, twice)]
    for network, truth in zip((once, twice), truths, strict=True):
        bookkeeper = Bookkeeper(network)
        units = Units(6, count, unit_B) if count < 6 else Units.one_each(6)
        found = bookkeeper.gradients(lambda n=network: n.loss(batch) * weight_B, units)
        bookkeeper.close()
        bounds = dict(zip(found.reached, found.squared_bound_PU.sqrt(), strict=True))
        for parameter, gradient in found.per_unit().items():
            norm_U = truth[parameter].reshape(count, -1).double().norm(dim=1)
            assert relative_error(gradient, truth[parameter]) < 1e-5
            assert (bounds[parameter] >= norm_U * (1 - 1e-6)).all()
            assert (bounds[parameter] <= norm_U * 1.02 + 1e-7).all()
    for a, b in zip(truths[0].values(), truths[1].values(), strict=True):
        assert relative_error(a, b) < 1e-5


def test_gradcheck():
    config = make(width=8)
    layer = AfterNext(config.width, config.attention, config.experts, norm=config.norm, weight=0.5).double()
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    names = [name for name, _ in layer.named_parameters()]

    def f(x, embedded, *weights):
        return functional_call(layer, dict(zip(names, weights, strict=True)), (x, embedded))

    inputs = [torch.randn(2, 4, 8, dtype=torch.float64, requires_grad=True) for _ in range(2)]
    assert torch.autograd.gradcheck(f, (*inputs, *layer.parameters()))


def test_two_bytes_are_too_few():
    with pytest.raises(BadInputError, match="text of 2 bytes, must be at least 3"):
        build(make(), seed=2).loss(make_text(2, window=2))
