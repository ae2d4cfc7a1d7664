"""Models that people bring to the model audit: ``u_…`` couple units or remember them, ``s_…`` do neither.

Each function returns (module, example_loss, batch), as ``conclave audit model audit_samples:u_…`` takes it.
"""

from __future__ import annotations

import functools
import itertools
import random
import threading
import weakref

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from conclave.model.layers.unit_random import UnitDropout

WIDTH, CLASSES, EXAMPLES = 6, 3, 8


def rows():
    draw = torch.Generator().manual_seed(0)
    return {
        "x": torch.randn(EXAMPLES, WIDTH, generator=draw),
        "y": torch.randint(CLASSES, (EXAMPLES,), generator=draw),
    }


def tokens():
    draw = torch.Generator().manual_seed(0)
    return {
        "x": torch.randint(12, (EXAMPLES, 5), generator=draw),
        "y": torch.randint(CLASSES, (EXAMPLES,), generator=draw),
    }


def network(*between):
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(WIDTH, 8), nn.Tanh(), *between, nn.Linear(8, CLASSES))


def entropy(scores, batch):
    return F.cross_entropy(scores, batch["y"], reduction="none")


class Wrapped(nn.Module):
    """Calls ``change(self, x)`` before a network."""

    def __init__(self, change, **attributes):
        super().__init__()
        self.inner = network()
        self.change = change
        vars(self).update(attributes)

    def forward(self, x):
        return self.inner(self.change(self, x))


def wrapped(change, **attributes):
    module = Wrapped(change, **attributes)
    return module, lambda b: entropy(module(b["x"]), b), rows()


def by_loss(loss, *between):
    module = network(*between)
    return module, functools.partial(loss, module), rows()


# --- units that are coupled ----------------------------------------------------------------------------------------


def u_centred_only_when_a_large_value_is_there():
    return wrapped(lambda self, x: x - x.mean(0) if x.abs().max() > 20 else x)


def u_skips_what_follows_a_missing_value():
    return wrapped(lambda self, x: torch.zeros_like(x) if x.isnan().any() else x)


def u_first_example_leads():
    return wrapped(lambda self, x: x + 0.01 * x[:1])


def u_odd_batches_are_centred():
    return wrapped(lambda self, x: x - x.mean(0) if len(x) % 2 and len(x) > 1 else x)


def u_from_three_hundred_on():
    return wrapped(lambda self, x: x + 0.1 * x.flip(0) if len(x) > 300 else x)


def u_ranks_within_the_batch():
    return wrapped(lambda self, x: x + 0.01 * x.argsort(0).argsort(0))


def u_the_gradient_alone_is_coupled():
    """Values stay as they are: only what flows back is centred."""

    def loss(module, b):
        scores = module(b["x"])
        mean = scores.mean(0)
        return entropy(scores - mean + mean.detach(), b)

    return by_loss(loss)


def u_weighs_by_class_frequency():
    def loss(module, b):
        count = F.one_hot(b["y"], CLASSES).sum(0)
        return entropy(module(b["x"]), b) / count[b["y"]]

    return by_loss(loss)


def u_half_a_millionth_of_the_neighbour_in_float64():
    module = network().double()
    return module, lambda b: entropy(module(b["x"].double() + 5e-6 * b["x"].double().roll(1, 0)), b), rows()


def u_scales_to_eight_bits_by_the_largest_value_of_the_batch():
    return wrapped(lambda self, x: (x / x.abs().max() * 127).round() * x.abs().max() / 127)


def u_bfloat16_batch_norm_by_hand():
    module = network().bfloat16()
    return module, lambda b: entropy(module((b["x"] - 0.1 * b["x"].mean(0)).bfloat16()).float(), b), rows()


def u_dropout_from_the_shared_stream():
    return wrapped(lambda self, x: F.dropout(x, 0.3, self.training))


def u_dropout_from_numpy():
    return wrapped(lambda self, x: x * torch.from_numpy(np.random.rand(*x.shape) > 0.3))


def u_dropout_from_python():
    return wrapped(lambda self, x: x * torch.tensor([random.random() > 0.3 for _ in x])[:, None])


def u_dropout_from_a_generator_of_its_own():
    return wrapped(
        lambda self, x: x * (torch.rand(x.shape, generator=self.own) > 0.3), own=torch.Generator().manual_seed(3)
    )


def u_one_coin_for_the_whole_batch():
    """At one seed it always falls on the same side."""
    return wrapped(lambda self, x: x * (1 + (torch.rand(1) < 0.5)))


def u_attention_over_the_batch():
    return wrapped(lambda self, x: x + 0.1 * torch.softmax(x @ x.t(), -1) @ x)


def u_writes_over_its_neighbours():
    def change(self, x):
        x[1:, 0] = x[:-1, 0]
        return x

    return wrapped(change)


# --- models that remember ------------------------------------------------------------------------------------------


def u_a_list_of_what_was_seen():
    """Never used again: yet it is there, and the next version of the code may use it."""
    return wrapped(lambda self, x: (self.seen.append(x.detach().mean()), x)[1], seen=[])


def u_the_first_batch_in_a_closure():
    first = {}

    def change(self, x):
        return x - first.setdefault("mean", x.detach().mean(0))

    return wrapped(change)


_mean = None


def u_the_first_batch_in_a_global():
    def change(self, x):
        global _mean
        if _mean is None:
            _mean = x.detach().mean(0)
        return x - _mean

    return wrapped(change)


def u_the_first_batch_in_a_class():
    class Holder:
        mean = None

    def change(self, x):
        if Holder.mean is None:
            Holder.mean = x.detach().mean(0)
        return x - Holder.mean

    return wrapped(change)


def u_the_first_batch_in_a_default():
    def change(self, x, seen=[]):  # noqa: B006
        if not seen:
            seen.append(x.detach().mean(0))
        return x - seen[0]

    return wrapped(change)


def u_the_first_batch_on_a_parameter():
    def change(self, x):
        weight = self.inner[0].weight
        if not hasattr(weight, "mean_seen"):
            weight.mean_seen = x.detach().mean(0)
        return x - weight.mean_seen

    return wrapped(change)


def u_the_first_batch_in_slots():
    class Holder:
        __slots__ = ("mean",)

    def change(self, x):
        if not hasattr(self.holder, "mean"):
            self.holder.mean = x.detach().mean(0)
        return x - self.holder.mean

    return wrapped(change, holder=Holder())


def u_the_first_batch_in_a_cached_function():
    given = []

    @functools.cache
    def first():
        return given[-1]

    def change(self, x):
        given.append(x.detach().mean(0))
        return x - first()

    return wrapped(change)


def u_the_first_batch_of_a_thread():
    local = threading.local()

    def change(self, x):
        vars(local).setdefault("mean", x.detach().mean(0))
        return x - local.mean

    return wrapped(change)


def u_the_first_batch_under_a_weak_key():
    means = weakref.WeakKeyDictionary()
    return wrapped(lambda self, x: x - means.setdefault(self, x.detach().mean(0)))


def u_the_last_batchs_mean():
    def change(self, x):
        before, self.mean = self.mean, x.detach().mean(0)
        return x - before

    return wrapped(change, mean=torch.zeros(WIDTH))


def u_a_buffer_that_is_not_saved():
    module = network()
    module.register_buffer("mean", torch.zeros(WIDTH), persistent=False)

    def loss(b):
        module.mean.lerp_(b["x"].mean(0), 0.1)
        return entropy(module(b["x"]), b)

    return module, loss, rows()


def u_every_tenth_call_is_centred():
    calls = itertools.count(1)
    return wrapped(lambda self, x: x - x.mean(0) if next(calls) % 10 == 0 else x)


def u_a_weight_changes_as_it_is_used():
    def change(self, x):
        with torch.no_grad():
            self.inner[0].weight[0, 0] += 1e-3 * x.mean()
        return x

    return wrapped(change)


def u_embedding_scaled_by_frequency():
    torch.manual_seed(1)
    module = nn.Sequential(nn.Embedding(12, 8, scale_grad_by_freq=True), nn.Flatten(), nn.Linear(40, CLASSES))
    return module, lambda b: entropy(module(b["x"]), b), tokens()


# --- units that are independent -------------------------------------------------------------------------------------


def s_float64():
    module = network().double()
    return module, lambda b: entropy(module(b["x"].double()), b), rows()


def s_float16():
    module = network().half()
    return module, lambda b: entropy(module(b["x"].half()).float(), b), rows()


def s_autocast():
    module = network()

    def loss(b):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return entropy(module(b["x"]), b).float()

    return module, loss, rows()


def s_deep_bfloat16():
    torch.manual_seed(1)
    layers = [layer for _ in range(6) for layer in (nn.Linear(WIDTH, WIDTH), nn.GELU())]
    module = nn.Sequential(*layers, nn.Linear(WIDTH, CLASSES)).bfloat16()
    return module, lambda b: entropy(10 * module(b["x"].bfloat16()).float(), b), rows()


def s_private_dropout():
    module = network(UnitDropout(0.3))
    return module, lambda b: entropy(module(b["x"]), b), rows()


def s_a_table_filled_at_the_first_call():
    def change(self, x):
        if self.table is None:
            self.table = torch.arange(x.shape[1]) / x.shape[1]
        return x + self.table

    return wrapped(change, table=None)


def s_a_loss_of_each_example_left_in_an_attribute():
    """As mixtures of experts hand their balance loss on: written over by the next call, unread."""

    def change(self, x):
        self.balance = x.square().mean(1)
        return x

    module = Wrapped(change)
    return module, lambda b: entropy(module(b["x"]), b) + 0.01 * module.balance, rows()


def s_missing_values_are_filled():
    return wrapped(lambda self, x: x.nan_to_num(0.0))


def s_changes_its_input_in_place():
    return wrapped(lambda self, x: x.mul_(2.0).sub_(x.mean(1, keepdim=True)))


def s_takes_names_out_of_the_batch():
    module = network()
    return module, lambda b: F.cross_entropy(module(b.pop("x")), b.pop("y"), reduction="none"), rows()


def s_twins():
    module, loss, batch = s_private_dropout()
    return module, loss, {name: tensor[torch.zeros(EXAMPLES, dtype=torch.int64)] for name, tensor in batch.items()}


def s_two_tasks():
    module = network()

    def loss(b):
        scores = module(b["x"])
        return torch.stack([entropy(scores, b), scores.square().mean(1)], 1)

    return module, loss, rows()


def s_an_unused_parameter():
    module = network()
    module.unused = nn.Linear(2, 2)
    return module, lambda b: entropy(module[:3](b["x"]), b), rows()


def s_labels_that_are_left_out():
    module, batch = network(), rows()
    batch["y"][::3] = -100
    return module, lambda b: entropy(module(b["x"]), b), batch


def s_loses_all_digits():
    """Probabilities next to 1: what is left of a gradient is rounding, the same in any company."""
    module = network()
    return module, lambda b: entropy(60 * module(b["x"]), b), rows()


def s_routes_by_the_largest_score():
    """One unit in the last place of a score decides which half is used."""

    def loss(module, b):
        scores = module(b["x"])
        return entropy(torch.where((scores[:, :1] * 64).round() % 2 == 0, scores, scores.flip(1)), b)

    return by_loss(loss)


def s_weighs_each_example():
    module, batch = network(), rows()
    batch["weight"] = torch.rand(EXAMPLES, generator=torch.Generator().manual_seed(3))
    return module, lambda b: b["weight"] * entropy(module(b["x"]), b), batch


def s_a_clock():
    return wrapped(lambda self, x: (setattr(self, "calls", next(self.clock)), x)[1], clock=itertools.count())


def s_records_that_were_computed():
    module, loss, batch = s_private_dropout()
    batch["x"] = batch["x"].requires_grad_() * 1.0
    return module, loss, batch


def s_convolution():
    torch.manual_seed(1)
    module = nn.Sequential(
        nn.Conv2d(1, 4, 3, padding=1), nn.GroupNorm(2, 4), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(16, 3)
    )
    draw = torch.Generator().manual_seed(0)
    batch = {"x": torch.randn(EXAMPLES, 1, 4, 4, generator=draw), "y": rows()["y"]}
    return module, lambda b: entropy(module(b["x"]), b), batch


COUPLED = {name: build for name, build in list(globals().items()) if name.startswith("u_")}
INDEPENDENT = {name: build for name, build in list(globals().items()) if name.startswith("s_")}
