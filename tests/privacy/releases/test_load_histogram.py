"""Expert loads: what a unit contributes, how far it can move them, that each is noised, what they are charged as."""

from __future__ import annotations

import itertools
import json
import math
from dataclasses import replace
from fractions import Fraction

import pytest
import torch
from conftest import in_the_soak_unless, make_batch, make_config, make_text, make_text_config
from ledger_samples import Lines, new_ledger, request
from router_samples import ROUTERS, router_config, router_text_config
from scipy import stats
from torch import nn

import conclave.privacy.audit.loads
import conclave.privacy.releases.load_histogram
import conclave.privacy.training.private_training
import conclave.privacy.training.unit_optimizer
from conclave.base.errors import BadInputError
from conclave.model.building import build
from conclave.model.experts.moe import MoELayer
from conclave.model.routers.routing import Routing
from conclave.privacy.accounting.mechanisms import SampledGaussian, joint_noise, split_noise
from conclave.privacy.audit.model import LOAD_CHECKS
from conclave.privacy.audit.subject import Subject
from conclave.privacy.bookkeeping import Units
from conclave.privacy.gradients.unit_index import UnitIndex
from conclave.privacy.ledger.reading.verification import audit_history
from conclave.privacy.randomness import derive, standard_normal
from conclave.privacy.releases.load_histogram import (
    GRID_BITS,
    LoadHistogram,
    load_name,
    noise_parts,
    release_shares,
    token_shares,
)
from conclave.privacy.training.dpsgd import train_privately
from conclave.privacy.training.dpsgd_mechanism import DpSgd
from conclave.privacy.training.private_training import PrivateTraining

SECRET = bytes(range(32))
MECHANISM = DpSgd(
    steps=1, learning_rate=0.5, sampling_rate=1.0, clip=0.5, noise_multiplier=1.5, declared_size=6, load_share=0.2
)
GRID = Fraction(1, 2**GRID_BITS)
MODES = [{}, {"gradients": "hooks"}, {"gradients": "ghost"}, {"numeric": "strict"}, {"physical_batch": 2}]


def training_of(network, mechanism=MECHANISM, secret=SECRET) -> PrivateTraining:
    return PrivateTraining(network, torch.optim.SGD(network.parameters(), lr=0.0), network.loss, mechanism, secret)


def histogram(network, batch, chosen, mechanism=MECHANISM, group_B=None):
    """The histogram of chosen units before noise, exact, [L, E]."""
    index = UnitIndex(len(next(iter(batch.values()))), group_B, mechanism.records_per_unit)
    with training_of(network, mechanism) as training:
        flat = training.loads_without_noise(batch, index, torch.tensor(chosen, dtype=torch.int64))
    values = [Fraction(value) for value in flat.tolist()]
    assert all(value % GRID == 0 for value in values)
    layers = network.config.layers
    return [values[n * len(values) // layers : (n + 1) * len(values) // layers] for n in range(layers)]


def by_hand(routing: Routing, held: int, lengths=None) -> list[list[Fraction]]:
    """Loops over examples, tokens and slots."""
    found = []
    for b, tokens in enumerate(routing.experts_BTK.tolist()):
        real = len(tokens) if lengths is None else max(0, min(lengths[b], len(tokens)))
        counts = [0] * held
        for t in range(real):
            for k, expert in enumerate(tokens[t]):
                if routing.used_BTK is None or bool(routing.used_BTK[b, t, k]):
                    counts[expert] += 1
        # Rounded toward zero onto the grid.
        found.append([GRID * int(Fraction(count, max(real, 1)) / GRID) for count in counts])
    return found


def routings_of(network, batch) -> list[Routing]:
    """What the layers choose in an honest forward pass in training mode, without private draws."""
    seen: list[Routing] = []
    handles = [
        layer.register_forward_hook(lambda module, inputs, output: seen.append(output[1]))
        for layer in network.modules()
        if isinstance(layer, MoELayer)
    ]
    with torch.no_grad():
        network.train()(batch)
    for handle in handles:
        handle.remove()
    return seen


def quiet(name):
    """A router's sample without noise on the choice, so that a forward pass can be repeated."""
    return {key: value for key, value in ROUTERS[name].items() if key != "noise"}


@pytest.mark.parametrize("name", [name for name in ROUTERS if name != "policy"])
@pytest.mark.parametrize("padded", [False, True])
def test_a_share_is_of_the_tokens_that_are_there(name, padded):
    options = {key: value for key, value in quiet(name).items() if key not in ("z_loss", "entropy")}
    network = build(make_config(router=options, balance=0.0, routed=6), seed=3)
    batch = dict(make_batch(6))
    lengths = [0, 1, 2, 3, 4, 9] if padded else None
    if padded:
        batch["length"] = torch.tensor(lengths)
    (routing,) = routings_of(network, batch)
    expected = by_hand(routing, 6, lengths)
    assert token_shares(routing, 6, batch).tolist() == [[int(v / GRID) for v in row] for row in expected]
    for row in expected:
        assert max(row) <= 1
        assert sum(row) <= 2
    if not padded and name != "top-p":  # nothing but held experts can be chosen, and all of K is told
        assert all(2 - sum(row) < 6 * GRID for row in expected)
    if not (padded and name == "attention"):  # the loss of that pair is refused
        found = histogram(network, batch, range(6))
        assert found == [[sum(column) for column in zip(*expected, strict=True)]]


@pytest.mark.parametrize(
    ("name", "options"),
    # Ghost mode refuses a policy, which uses its parameters several times.
    in_the_soak_unless(
        [(n, o) for n in ("softmax, biased", "attention", "policy") for o in MODES],
        [(n, o) for n in ROUTERS for o in MODES if not (n == "policy" and o.get("gradients") == "ghost")],
    ),
)
def test_every_mode_counts_the_same(name, options):
    """With private draws: a mode that runs an example twice, or alone, draws the same for it."""
    network, batch = build(router_text_config(name), seed=3), make_text(5)
    truth = histogram(network, batch, range(5))
    apart = [histogram(network, batch, [unit]) for unit in range(5)]
    assert truth == [[sum(column) for column in zip(*layer, strict=True)] for layer in zip(*apart, strict=True)]
    assert histogram(network, batch, range(5), replace(MECHANISM, **options)) == truth


@pytest.mark.parametrize("options", MODES[:3])
def test_an_unusable_gradient_does_not_hide_or_repeat_a_choice(options):
    """Ghost mode runs the usable units again; a NaN record is counted by where its tokens went, within the bound."""
    network, batch = build(make_config(), seed=3), make_batch(5)
    batch["image"][2] = math.nan
    found = histogram(network, batch, range(5), replace(MECHANISM, **options))
    others = histogram(network, batch, [0, 1, 3, 4], replace(MECHANISM, **options))
    moved = [a - b for a, b in zip(found[0], others[0], strict=True)]
    assert all(0 <= value <= 1 for value in moved)
    assert sum(moved) <= 2


# --- one unit more or less, over all neighbours --------------------------------------------------------------------


def worst_move(network, batch, mechanism, group_B=None) -> Fraction:
    """The largest squared move, exact: every subset of the data set as a sample, every unit of it left out."""
    units = UnitIndex(len(next(iter(batch.values()))), group_B, mechanism.records_per_unit).count
    found = {
        chosen: [value for layer in histogram(network, batch, list(chosen), mechanism, group_B) for value in layer]
        for size in range(units + 1)
        for chosen in itertools.combinations(range(units), size)
    }
    assert len(found) == 2**units
    assert not any(found[()])
    return max(
        sum((a - b) ** 2 for a, b in zip(found[chosen], found[tuple(u for u in chosen if u != unit)], strict=True))
        for chosen in found
        for unit in chosen
    )


def one_sided(network):
    """Crafted: whatever a token is, the first ``top_k`` experts of its layer are chosen."""
    with torch.no_grad():
        for layer in network.modules():
            if isinstance(layer, MoELayer):
                layer.router.selection_bias[: layer.router.top_k] = 100.0
    return network


@pytest.mark.parametrize("options", [{}, {"numeric": "strict"}])
@pytest.mark.parametrize("kind", ["sigmoid", "softmax"])
def test_no_neighbour_moves_the_histogram_by_more_than_the_bound_and_one_attains_it(options, kind):
    router = {"kind": kind} | ({"selection_bias": True} if kind == "softmax" else {})
    config = make_text_config(experts={"routed": 4, "hidden": 8, "top_k": 2, "balance": 0.0, "router": router})
    mechanism, batch = replace(MECHANISM, **options), make_text(5)
    assert 0 < worst_move(build(config, seed=3), batch, mechanism) < 4
    assert worst_move(one_sided(build(config, seed=3)), batch, mechanism) == 4  # L·K


def test_a_group_moves_the_histogram_by_no_more_whatever_its_size():
    config = make_config(router={"kind": "sigmoid"})
    groups = torch.tensor([7, 3, 7, 7, 3, 7])  # a group of four, of which three take part, and one of two
    mechanism = replace(MECHANISM, records_per_unit=3)
    assert worst_move(one_sided(build(config, seed=3)), make_batch(6), mechanism, groups) == 2
    network, batch = build(config, seed=3), make_batch(6)
    assert worst_move(network, batch, mechanism, groups) < 2
    alone = [histogram(network, batch, [record])[0] for record in range(6)]
    means = [
        [sum(alone[r][e] for r in group) / GRID // len(group) * GRID for e in range(6)] for group in ([1, 4], [0, 2, 3])
    ]
    assert histogram(network, batch, [0, 1], mechanism, groups) == [[a + b for a, b in zip(*means, strict=True)]]


def test_at_level_strict_company_changes_no_bit_where_experts_are_tied():
    """Crafted: experts with the same row, or almost. At level fast a product's last bits may decide between them."""
    config = make_text_config()
    network, batch = build(config, seed=3), make_text(6)
    with torch.no_grad():
        for block in network.blocks:
            block.moe.router.score.weight[1] = block.moe.router.score.weight[0] * (1 + 2.0**-23)
            block.moe.router.score.weight[3] = block.moe.router.score.weight[2]
    strict = replace(MECHANISM, numeric="strict")
    apart = [histogram(network, batch, [unit], strict) for unit in range(6)]
    together = histogram(network, batch, range(6), strict)
    assert together == [[sum(column) for column in zip(*layer, strict=True)] for layer in zip(*apart, strict=True)]


# --- noise ---------------------------------------------------------------------------------------------------------


def test_every_experts_load_is_noised_as_stated_whoever_is_there():
    """Residuals of 150 charges of two steps: χ² and Kolmogorov-Smirnov, false alarm 1e-6 each."""
    network = one_sided(build(make_config(router={"kind": "sigmoid"}), seed=3))  # four of six experts see nobody
    empty = {name: tensor[:0] for name, tensor in make_batch(4).items()}
    for batch, share in ((make_batch(4), 4.0), (empty, 0.0)):
        known = torch.tensor([2 * share, 2 * share, 0, 0, 0, 0], dtype=torch.float64)
        index = UnitIndex(len(batch["label"]))
        residuals = []
        for number in range(150):
            with training_of(network, secret=derive(SECRET, number)) as training:
                training.step(batch, index)
                training.step(batch, index)
                residuals.append(training.loads[load_name(0)].double() - known)
        std = 1.5 / math.sqrt(0.2) * math.sqrt(2) * math.sqrt(2)  # σ/√share · √(L·K) · √steps
        values = torch.stack(residuals) / std
        assert bool((values.abs() > 1e-7).all())
        for entry in (values, *values.T):
            law = stats.chi2(entry.numel())
            assert law.ppf(5e-7) < float(entry.square().sum()) < law.ppf(1 - 5e-7)
        assert stats.kstest(values.flatten().numpy(), "norm").pvalue > 1e-6


def test_the_noise_is_for_all_layers_together():
    """Two layers, nobody there: 8 values of 60 charges, false alarm 1e-6. With √K for √(L·K) squares were halved."""
    network = build(make_text_config(), seed=3)
    nobody = {name: tensor[:0] for name, tensor in make_text(1).items()}
    values = []
    for number in range(60):
        with training_of(network, secret=derive(SECRET, number)) as training:
            training.step(nobody, UnitIndex(0))
            assert training.loads.keys() == {"load/0", "load/1"}
            values += list(training.loads.values())
    square = float((torch.stack(values).double() / (MECHANISM.noise_parts["loads"] * 2)).square().sum())
    assert stats.chi2(480).ppf(5e-7) < square < stats.chi2(480).ppf(1 - 5e-7)


def test_an_example_that_no_mode_ran_counts_as_nothing():
    network, batch = build(make_config(), seed=3), make_batch(4)
    loads = LoadHistogram(network, 1.0)
    loads.begin_batch(torch.tensor([5, 2, 9, 7]))
    with loads.watching(torch.tensor([9, 5]), batch), torch.no_grad():
        network({name: tensor[[2, 0]] for name, tensor in batch.items()})
    with torch.no_grad():
        network(batch)  # not watched
    loads.end_batch(Units.one_each(4))
    counted = loads.take_sums()
    loads.close()
    expected = [histogram(network, batch, [number])[0] for number in (0, 2)]
    assert [Fraction(value) for value in counted.tolist()] == [a + b for a, b in zip(*expected, strict=True)]


def test_noise_lies_on_the_grid_of_the_counts():
    network = build(make_config(), seed=3)
    with training_of(network) as training:
        training.step(make_batch(4))
        assert all(torch.equal(total, total.round()) for total in training._loads._released)


def test_no_secret_is_used_twice(monkeypatch):
    """Neither by two steps, nor by gradient, count of an adaptive clip and loads of one step."""
    used = []

    def recorded(secret, count):
        used.append(secret)
        return standard_normal(secret, count)

    monkeypatch.setattr(conclave.privacy.training.private_training, "standard_normal", recorded)
    monkeypatch.setattr(conclave.privacy.training.unit_optimizer, "standard_normal", recorded)
    monkeypatch.setattr(conclave.privacy.releases.load_histogram, "standard_normal", recorded)
    network = build(make_config(), seed=3)
    with training_of(network, replace(MECHANISM, clipping="adaptive")) as training:
        for _ in range(3):
            training.step(make_batch(4))
    assert len(used) == 3 * (len(list(network.parameters())) + 2) == len(set(used))


def test_the_loads_are_of_the_sample_of_the_gradient():
    """q = ½: released loads, less their noise, are the histogram of exactly the units whose gradients were summed."""
    network, batch = build(make_config(), seed=3), make_batch(6)
    mechanism = replace(MECHANISM, sampling_rate=0.5)
    with training_of(network, mechanism) as training:
        chosen = training.sample(6)
        assert 0 < len(chosen) < 6
        known = training.loads_without_noise(batch, UnitIndex(6), chosen)
        training.step(batch)
        released = training.loads[load_name(0)].double()
    std = mechanism.noise_parts["loads"] * math.sqrt(2)
    noise = (standard_normal(derive(SECRET, "loads", 0), 6) * std * 2.0**GRID_BITS).round() * 2.0**-GRID_BITS
    torch.testing.assert_close(released, known + noise, rtol=1e-6, atol=1e-6)


def test_what_was_counted_for_an_audit_is_in_no_release():
    network, batch = build(make_config(), seed=3), make_batch(6)
    with training_of(network) as plain, training_of(network) as audited:
        audited.loads_without_noise(batch, UnitIndex(6), torch.arange(6))
        audited.noised_gradients(batch, UnitIndex(6))  # counts as a step
        audited.step(batch)
        plain.step_number = 1
        plain.step(batch)
        assert torch.equal(audited.loads[load_name(0)], plain.loads[load_name(0)])


def test_training_is_the_same_with_loads_but_for_the_size_of_its_noise():
    """A mechanism without loads and with the gradient's part as its whole noise leaves the same parameters."""
    states = []
    for mechanism in (MECHANISM, replace(MECHANISM, load_share=0.0, noise_multiplier=MECHANISM.noise_parts["delta"])):
        network = build(make_config(), seed=3)
        train_privately(network, network.loss, make_batch(6), mechanism, SECRET)
        states.append(network.state_dict())
    assert all(torch.equal(tensor, states[1][name]) for name, tensor in states[0].items())


def test_a_model_without_the_familys_layers_has_no_loads_to_release():
    module = nn.Linear(4, 2)
    with pytest.raises(BadInputError, match="no MoE layer"):
        PrivateTraining(
            module, torch.optim.SGD(module.parameters()), lambda b: module(b["x"]).sum(1), MECHANISM, SECRET
        )


# --- what it is charged as -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("share", [1e-4, 0.01, 0.05, 0.3, 0.5])
@pytest.mark.parametrize("sigma", [0.543682, 3.58532, 40.0])
def test_the_parts_together_have_exactly_the_noise_that_is_charged(sigma, share):
    parts = noise_parts(sigma, share)
    assert sigma <= joint_noise(parts.values()) <= sigma * (1 + 1e-15)
    assert parts["delta"] == pytest.approx(sigma / math.sqrt(1 - share), rel=1e-14)
    assert parts["loads"] == pytest.approx(sigma / math.sqrt(share), rel=1e-14)
    assert release_shares(share) == {"delta": 1 - share, "loads": share}
    assert noise_parts(sigma, 0.0) == {"delta": sigma}
    assert split_noise(sigma, [("all", 1.0)]) == (("all", sigma),)


def test_an_adaptive_clip_splits_the_gradients_part_further():
    mechanism = replace(MECHANISM, clipping="adaptive", declared_size=100)
    count = mechanism.adaptive.count_noise(mechanism.noise_parts["delta"], mechanism.divisor)
    precision = mechanism.gradient_noise_multiplier**-2 + (0.5 / count) ** 2 + mechanism.noise_parts["loads"] ** -2
    assert precision**-0.5 == pytest.approx(1.5, rel=1e-12)
    # And the count has that noise: its logarithm moves by rate · N(0, (count/divisor)²) where nobody is there.
    network, moves = build(make_config(), seed=3), []
    nobody = {name: tensor[:0] for name, tensor in make_batch(1).items()}
    for number in range(100):
        with training_of(network, mechanism, derive(SECRET, number)) as training:
            training.step(nobody, UnitIndex(0))
            noise = standard_normal(derive(derive(SECRET, number), "count", 0), 1).item() * count
            moves.append(mechanism.adaptive.next(0.5, noise, mechanism.divisor) - training.clip)
    assert max(map(abs, moves)) < 1e-12


def test_loads_that_no_part_names_are_refused_and_found(tmp_path):
    """The sabotage: two releases of one sample, and a charge for the gradient alone."""
    parts = noise_parts(1.5, 0.2)
    alone = SampledGaussian(sampling_rate=0.1, noise_multiplier=parts["delta"], steps=3)
    together = SampledGaussian(sampling_rate=0.1, noise_multiplier=1.5, steps=3)
    for wrong in ((), (("delta", 1.6),), (*parts.items(), ("other", 9.0))):
        with pytest.raises(BadInputError, match="must each be a part with a sigma"):
            request(mechanism=alone, parts=wrong, releases=("delta", "loads")).mechanism_json()
    ledger = new_ledger(tmp_path)
    ledger.reserve(request(mechanism=together, parts=tuple(parts.items()), releases=("delta", "loads")), bytes(32))
    (entry,) = ledger.entries()
    honest = audit_history(Lines(ledger.genesis, [entry]))
    assert honest.findings == []
    (line,) = honest.joint
    assert line.startswith(
        "1 charges of delta (sigma 1.67705), loads (sigma 3.3541) from one sample each, as one event"
    )
    stripped = {key: value for key, value in json.loads(entry.mechanism_text).items() if key != "parts"}
    forged = replace(entry, mechanism_text=json.dumps(stripped, sort_keys=True, separators=(",", ":")))
    assert any("must each be a part" in finding for finding in audit_history(Lines(ledger.genesis, [forged])).findings)


# --- the model audit finds what is broken -----------------------------------------------------------------------------


class NotDividedByTokens(LoadHistogram):
    def _on_forward(self, number, layer, inputs, output):
        super()._on_forward(number, layer, inputs, output)
        if self._watched is not None:
            self._shares[number] *= output[1].experts_BTK.shape[1]


class WithoutNoise(LoadHistogram):
    def add_noise(self, secret):
        self.noise_multiplier = 0.0
        super().add_noise(secret)


class SlightlyLessNoise(LoadHistogram):
    def add_noise(self, secret):
        self.noise_multiplier *= 0.9
        super().add_noise(secret)


class NoiseWhereTouched(LoadHistogram):
    def add_noise(self, secret):
        touched = [total != 0 for total in self._sums]
        super().add_noise(secret)
        for released, was in zip(self._released, touched, strict=True):
            released *= was


class OneNoise(LoadHistogram):
    def add_noise(self, secret):
        super().add_noise(bytes(32))


class KOfTheBatch(LoadHistogram):
    """The sensitivity by what a batch happened to use, not by what it could."""

    def _on_forward(self, number, layer, inputs, output):
        super()._on_forward(number, layer, inputs, output)
        used = output[1].used_BTK
        most = output[1].experts_BTK.shape[-1] if used is None else int(used.sum(-1).amax()) if used.numel() else 0
        self.sensitivity = math.sqrt(len(self._sums) * most)


def broken(kind):
    class Broken(PrivateTraining):
        def __init__(self, *args):
            super().__init__(*args)
            if self._loads is not None:
                self._loads.close()
                self._loads = kind(self._module, self._loads.noise_multiplier)

    return Broken


@pytest.mark.parametrize(
    ("kind", "caught"),
    [
        (LoadHistogram, set()),
        (NotDividedByTokens, {"load sensitivity"}),
        (WithoutNoise, {"load noise"}),
        (SlightlyLessNoise, {"load noise"}),
        (NoiseWhereTouched, {"load noise"}),
        (OneNoise, {"load noise"}),
        (KOfTheBatch, {"load noise"}),
    ],
)
def test_the_model_audit_catches_a_broken_histogram(monkeypatch, kind, caught):
    """A charge costs the same for many experts: fewer charges of more, half as many values as the audit itself takes.

    σ less by a tenth is then nine standard errors away.
    """
    monkeypatch.setattr(conclave.privacy.audit.loads, "_CHARGES", 100)
    network = build(router_config("top-p", routed=48), seed=3)
    with torch.no_grad():
        network.blocks[0].moe.router.score.weight *= 20.0  # sure of one expert, where two could be used
    subject = Subject(network, network.loss, make_batch(8), MECHANISM, broken(kind))
    findings = {name: check(subject).violation for name, check in LOAD_CHECKS.items()}
    assert findings.keys() == {"load sensitivity", "load noise"}
    assert {check for check, violation in findings.items() if violation} == caught, findings
