"""Every trained parameter's gradient is a unit's own, by autograd of the unit alone, or the model is refused."""

from __future__ import annotations

from contextlib import contextmanager

import pytest
import torch
import torch.nn.functional as F
from conftest import make_config
from microbatches import alone, relative_error
from opacus.layers import DPGRU, DPLSTM, DPRNN
from torch import nn
from torch.utils.checkpoint import checkpoint

from conclave.base.errors import BadInputError
from conclave.model.building import build
from conclave.model.layers.unit_random import UnitDropout
from conclave.privacy.bookkeeping.contributions import PerUnit
from conclave.privacy.bookkeeping.layers import register
from conclave.privacy.gradients.modes import mode_for
from conclave.privacy.gradients.unit_index import UnitIndex
from conclave.privacy.training import accounted
from conclave.privacy.training.make_private import make_private

UNITS = 4
RIGHT = "right"


@contextmanager
def training(module, loss, **options):
    optimizer = torch.optim.SGD(module.parameters(), lr=0.0)
    given = {"noise_multiplier": 1.0, "sampling_rate": 1.0, "clip": 100.0, "declared_size": UNITS} | options
    with make_private(module, optimizer, loss, **given) as attached:
        yield attached


def outcome(module, loss, batch, **options) -> str:
    """ "right", or the sentence of the refusal: the sum without noise against every unit alone."""
    try:
        with training(module, loss, **options) as attached:
            sums = attached.sums_without_noise(batch, UnitIndex(UNITS), torch.arange(UNITS))
    except BadInputError as refusal:
        return str(refusal)
    truth = torch.cat([g.sum(0).flatten() for g in alone(module, loss, batch, torch.arange(UNITS)).values()])
    assert relative_error(torch.cat([s.flatten() for s in sums]), truth) < 1e-4
    return RIGHT


class Model(nn.Module):
    """Layers by name, and what to make of them."""

    def __init__(self, forward, **layers: nn.Module) -> None:
        super().__init__()
        self.layers = nn.ModuleDict(layers)
        self.compute = forward

    def forward(self, x):
        return self.compute(self.layers, x)

    def loss(self, batch):
        return torch.sin(self(batch["x"])).flatten(1).sum(1)


def rows(*shape):
    return torch.randn(UNITS, *shape, generator=torch.Generator().manual_seed(1))


def ids(*shape):
    return torch.randint(7, (UNITS, *shape), generator=torch.Generator().manual_seed(1))


def shared(m, x):
    return m["b"](torch.tanh(m["a"](x)))


def share(module):
    module.layers["b"].weight = module.layers["a"].weight
    return module


def recurrent(kind):
    return Model(lambda m, x: m["h"](m["r"](x)[0].mean(1)), r=kind(6, 4, batch_first=True), h=nn.Linear(4, 3))


def in_checkpoint(reentrant, *more):
    layers = nn.Sequential(nn.Linear(6, 6), *more)
    return Model(
        lambda m, x: m["b"](checkpoint(m["c"], torch.tanh(m["a"](x)), use_reentrant=reentrant)),
        a=nn.Linear(6, 6), b=nn.Linear(6, 3), c=layers,
    )  # fmt: skip


OUTSIDE = "is used outside of the forward pass"
BY_BOOKKEEPING = "'bookkeeping'"
MODELS = {
    "DPLSTM": (lambda: (recurrent(DPLSTM), rows(5, 6)), RIGHT, RIGHT, RIGHT),
    "DPGRU": (lambda: (recurrent(DPGRU), rows(5, 6)), RIGHT, RIGHT, RIGHT),
    "DPRNN": (lambda: (recurrent(DPRNN), rows(5, 6)), RIGHT, RIGHT, RIGHT),
    "unused layers": (
        lambda: (Model(lambda m, x: (m["a"](x), m["b"](x))[0], a=nn.Linear(6, 3), b=nn.Linear(6, 3)), rows(6)),
        RIGHT, RIGHT, RIGHT,
    ),
    "one weight of two layers": (
        lambda: (share(Model(shared, a=nn.Linear(6, 6), b=nn.Linear(6, 6))), rows(6)), RIGHT, RIGHT, BY_BOOKKEEPING,
    ),
    "called twice, used once": (
        lambda: (Model(lambda m, x: (m["a"](x), m["a"](-x))[0], a=nn.Linear(6, 3)), rows(6)),
        RIGHT, BY_BOOKKEEPING, BY_BOOKKEEPING,
    ),
    "padded table": (
        lambda: (Model(lambda m, x: m["e"](x), e=nn.Embedding(7, 3, padding_idx=2)), ids(3)),
        RIGHT, BY_BOOKKEEPING, BY_BOOKKEEPING,
    ),
    "sparse table": (lambda: (Model(lambda m, x: m["e"](x), e=nn.Embedding(7, 3, sparse=True)), ids(3)), *[RIGHT] * 3),
    "bags": (
        lambda: (Model(lambda m, x: m["e"](x), e=nn.EmbeddingBag(7, 3)), ids(3)), RIGHT, BY_BOOKKEEPING, BY_BOOKKEEPING,
    ),
    "reflecting convolution": (
        lambda: (Model(lambda m, x: m["c"](x), c=nn.Conv2d(2, 3, 3, padding=1, padding_mode="reflect")), rows(2, 4, 4)),
        RIGHT, BY_BOOKKEEPING, BY_BOOKKEEPING,
    ),
    "norm without bias": (
        lambda: (Model(lambda m, x: m["n"](x), n=nn.LayerNorm(6, bias=False)), rows(6)),
        RIGHT, BY_BOOKKEEPING, BY_BOOKKEEPING,
    ),
    "a layer nobody knows": (
        lambda: (Model(lambda m, x: m["p"](m["a"](x)), a=nn.Linear(6, 6), p=nn.PReLU()), rows(6)),
        RIGHT, BY_BOOKKEEPING, BY_BOOKKEEPING,
    ),
    "weight as an argument": (
        lambda: (Model(lambda m, x: F.linear(m["a"](x), m["a"].weight), a=nn.Linear(6, 6)), rows(6)), *[OUTSIDE] * 3,
    ),
    "scores by a table": (
        lambda: (Model(lambda m, x: m["e"](x) @ m["e"].weight.T, e=nn.Embedding(7, 3)), ids(3)), *[OUTSIDE] * 3,
    ),
    "small penalty on weights": (
        lambda: (Model(lambda m, x: m["a"](x) + 1e-6 * m["a"].weight.square().sum(), a=nn.Linear(6, 3)), rows(6)),
        *[OUTSIDE] * 3,
    ),
    "forward without hooks": (
        lambda: (Model(lambda m, x: m["a"].forward(x), a=nn.Linear(6, 3)), rows(6)), *[OUTSIDE] * 3,
    ),
    "checkpoint": (lambda: (in_checkpoint(False, nn.GELU()), rows(6)), RIGHT, BY_BOOKKEEPING, BY_BOOKKEEPING),
    "checkpoint that hides its layers": (
        lambda: (in_checkpoint(True), rows(6)), *["use use_reentrant=False"] * 3,
    ),
    "checkpoint that draws": (
        lambda: (in_checkpoint(False, UnitDropout(0.5)), rows(6)), *["keep random layers out of checkpoints"] * 3,
    ),
    "as many steps as records, steps first": (
        lambda: (Model(lambda m, x: m["a"](x.transpose(0, 1)).transpose(0, 1), a=nn.Linear(6, 3)), rows(UNITS, 6)),
        *["the batch must stay the first axis"] * 3,
    ),
}  # fmt: skip


@pytest.mark.parametrize("place", [0, 1, 2], ids=["bookkeeping", "hooks", "ghost"])
@pytest.mark.parametrize("name", MODELS)
def test_a_gradient_is_right_or_refused_in_every_mode(name, place):
    make, *expected = MODELS[name]
    torch.manual_seed(0)
    module, x = make()
    found = outcome(module, module.loss, {"x": x}, gradients=("bookkeeping", "hooks", "ghost")[place])
    assert found == RIGHT if expected[place] == RIGHT else expected[place] in found, found


@pytest.mark.parametrize("name", ["DPLSTM", "sparse table", "bags", "checkpoint", "one weight of two layers"])
def test_what_fast_modes_can_do_strict_can(name):
    torch.manual_seed(0)
    module, x = MODELS[name][0]()
    assert outcome(module, module.loss, {"x": x}, numeric="strict") == RIGHT


def test_strict_refuses_the_checkpoints_that_autograd_cannot_be_asked_about():
    module, x = MODELS["checkpoint that hides its layers"][0]()
    assert "use_reentrant=False" in outcome(module, module.loss, {"x": x}, numeric="strict")
    module, x = MODELS["checkpoint that draws"][0]()
    assert "keep random layers out" in outcome(module, module.loss, {"x": x}, numeric="strict")


def test_a_layer_that_changes_between_steps_is_used_as_it_is():
    class Warm(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight, self.warmth = nn.Parameter(torch.randn(6, 3)), 1.0

        def forward(self, x):
            return x @ self.weight / self.warmth

    module, batch = Model(lambda m, x: m["w"](x), w=Warm()), {"x": rows(6)}
    with training(module, module.loss) as attached:
        for warmth in (1.0, 0.5, 0.1):
            module.layers["w"].warmth = warmth
            (total,) = attached.sums_without_noise(batch, UnitIndex(UNITS), torch.arange(UNITS))
            (truth,) = alone(module, module.loss, batch, torch.arange(UNITS)).values()
            assert relative_error(total, truth.sum(0)) < 1e-5
        module.load_state_dict({"layers.w.weight": torch.ones(6, 3)})
        (total,) = attached.sums_without_noise(batch, UnitIndex(UNITS), torch.arange(UNITS))
        (truth,) = alone(module, module.loss, batch, torch.arange(UNITS)).values()
        assert relative_error(total, truth.sum(0)) < 1e-5


def test_a_penalty_on_gradients_is_refused_however_little_it_weighs():
    """Its second backward pass goes through weights that took no part in the graph."""
    module = Model(lambda m, x: m["b"](torch.tanh(m["a"](x))), a=nn.Linear(6, 4), b=nn.Linear(4, 1))

    def loss(batch):
        x = batch["x"].clone().requires_grad_()
        score = module(x)
        (gradient,) = torch.autograd.grad(score.sum(), x, create_graph=True)
        return score.square().sum(1) + 0.01 * gradient.square().sum(1)

    assert "or the loss holds a gradient itself" in outcome(module, loss, {"x": rows(6)})


@pytest.mark.parametrize("gradients", ["hooks", "ghost"])
def test_an_activation_in_place_that_opacus_cannot_see_through_is_refused(gradients):
    module = Model(lambda m, x: m["b"](F.relu(m["a"](x), inplace=True)), a=nn.Linear(6, 4), b=nn.Linear(4, 3))
    assert "use inplace=False, or 'bookkeeping'" in outcome(module, module.loss, {"x": rows(6)}, gradients=gradients)
    assert outcome(module, module.loss, {"x": rows(6)}) == RIGHT


def test_group_norm_of_plain_rows_is_right():
    module = Model(lambda m, x: m["b"](m["a"](x)), a=nn.GroupNorm(2, 6), b=nn.Linear(6, 3))
    assert outcome(module, module.loss, {"x": rows(6)}) == RIGHT


def test_a_model_that_cannot_be_watched_is_refused():
    module = nn.Linear(6, 3)
    mapped = torch.vmap(lambda x: module(x[None]).square().sum())
    assert "cannot be told (RuntimeError" in outcome(module, lambda b: mapped(b["x"]), {"x": rows(6)})


def test_a_branch_that_only_records_take_is_found_where_their_owner_alone_is_told():
    module = Model(
        lambda m, x: m["a"](x) if x.abs().max() < 50 else F.linear(x, m["a"].weight), a=nn.Linear(6, 3, bias=False)
    )
    assert OUTSIDE in outcome(module, module.loss, {"x": 100 * rows(6)})
    mode = mode_for("bookkeeping", module)
    accounted.check_accounted(mode, module, module.loss, {"x": 100 * rows(6)})  # as on a node


def test_a_loss_that_is_wrapped_is_not_taken_for_another_in_the_same_wrapper():
    module = Model(lambda m, x: m["a"](x), a=nn.Linear(6, 3))

    def wrap(inner):
        return lambda batch: inner(batch)

    assert outcome(module, wrap(module.loss), {"x": rows(6)}) == RIGHT
    penalised = wrap(lambda batch: module.loss(batch) + module.layers["a"].weight.sum())
    assert OUTSIDE in outcome(module, penalised, {"x": rows(6)})


def test_a_batch_that_is_changed_in_place_is_another_at_every_pass():
    module = Model(lambda m, x: m["a"](x.mul_(2.0)), a=nn.Linear(6, 3))
    records = {"x": rows(6)}
    with training(module, lambda b: module.loss({"x": b.pop("x")})) as attached:
        sums = attached.sums_without_noise(records, UnitIndex(UNITS), torch.arange(UNITS))
    assert torch.equal(records["x"], rows(6))
    loss = torch.sin(module.layers["a"](2.0 * rows(6))).sum()
    truth = torch.autograd.grad(loss, list(module.parameters()))
    assert relative_error(torch.cat([s.flatten() for s in sums]), torch.cat([g.flatten() for g in truth])) < 1e-4


def test_a_wrong_rule_is_found_by_the_sum():
    class Doubling(nn.Linear):
        def forward(self, x):
            return 2 * super().forward(x)

    @register(Doubling)
    def too_small(layer, inputs, delta, step):
        yield layer.weight, PerUnit(step.units.add_up(torch.einsum("bo,bi->boi", delta, inputs[0].value)))

    module = Model(lambda m, x: m["a"](m["b"](x)), a=Doubling(6, 3, bias=False), b=nn.Linear(6, 6))
    assert "parameter layers.a.weight do not add up to autograd's" in outcome(module, module.loss, {"x": rows(6)})


@pytest.mark.parametrize(
    "change",
    [
        lambda module: module.layers["a"].weight.requires_grad_(False),
        lambda module: module.layers.update({"late": nn.Linear(2, 2)}),
        lambda module: module.load_state_dict({k: v.clone() for k, v in module.state_dict().items()}, assign=True),
    ],
    ids=["frozen", "added", "replaced"],
)
def test_parameters_that_are_not_those_of_the_start_are_refused(change):
    module = Model(lambda m, x: m["a"](x), a=nn.Linear(6, 3))
    with training(module, module.loss) as attached:
        attached.step({"x": rows(6)})
        change(module)
        with pytest.raises(BadInputError, match="since private training was attached; attach it anew"):
            attached.step({"x": rows(6)})


class Remembering(nn.Module):
    """Keeps the first batch it sees, draws from torch, and counts in a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.score, self.first = nn.Linear(6, 3), None
        self.register_buffer("calls", torch.zeros(1))

    def forward(self, x):
        self.first = x.detach() if self.first is None else self.first
        self.calls += 1
        return self.score(x + torch.rand(1))


def test_the_check_leaves_nothing_behind_and_sees_no_record():
    module, seen = Remembering(), []
    kept = {name: tensor.clone() for name, tensor in module.state_dict().items()}

    def loss(batch):
        seen.append(batch["x"])
        return module(batch["x"]).sum(1)

    mode, state = mode_for("bookkeeping", module), torch.get_rng_state()
    accounted.check_accounted(mode, module, loss, {"x": torch.full((9, 6), torch.nan)})
    assert torch.equal(torch.get_rng_state(), state)
    assert module.first is None
    assert all(torch.equal(tensor, kept[name]) for name, tensor in module.state_dict().items())
    assert all(p.grad is None and p.requires_grad for p in module.parameters())
    assert seen
    assert all(x.isfinite().all() for x in seen)


def test_where_made_up_examples_cannot_be_run_the_structure_is_looked_at_with_the_first_records():
    module, batch = nn.Linear(6, 3), {"x": rows(6), "length": torch.full((UNITS,), 5)}

    def picky(batch, penalty):
        if not bool((batch["length"] > 2).all()):
            raise ValueError("too short")
        loss_B = torch.sin(module(batch["x"])).sum(1)
        return loss_B + penalty * module.weight.sum() if penalty else loss_B

    assert outcome(module, lambda b: picky(b, 0.0), batch) == RIGHT
    assert OUTSIDE in outcome(module, lambda b: picky(b, 0.1), batch)


def test_a_model_is_asked_once_until_it_changes(monkeypatch):
    asked = []
    monkeypatch.setattr(accounted, "_check", lambda *_: asked.append(1))
    network = build(make_config(), seed=1)
    records = {"x": rows(6)}
    for _ in range(3):  # a mode of its own each time, as trainers have
        accounted.check_accounted(mode_for("bookkeeping", network), network, network.loss, records)
        mode_for("bookkeeping", network).close()
        for layer in network.modules():
            layer._forward_hooks.clear()
            layer._forward_pre_hooks.clear()
    assert len(asked) == 1
    network.flavour = "another"
    accounted.check_accounted(mode_for("bookkeeping", network), network, network.loss, records)
    accounted.check_accounted(mode_for("strict", network), network, network.loss, records)
    accounted.check_accounted(mode_for("strict", network), network, network.loss, {"x": rows(7)})
    assert len(asked) == 4
