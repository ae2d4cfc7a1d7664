"""Per-unit gradients and norms against the microbatch truth: each unit run alone through plain autograd."""

from __future__ import annotations

import pytest
import torch
from conftest import make_batch, make_config, make_text_config
from family_samples import FAMILY, examples_for
from opacus.grad_sample import GradSampleHooks, GradSampleHooksFastGradientClipping

import conclave.privacy.gradients.per_unit  # noqa: F401  (registers the samplers under test)
from conclave.model.building import build
from conclave.model.experts.stacked import GroupedLinear
from conclave.model.network import Network
from conclave.privacy.gradients.per_unit import grouped_linear_gradients, grouped_linear_norms

pytestmark = pytest.mark.filterwarnings("ignore:Full backward hook is firing")

CONFIGS = {
    "tokens, shared expert": make_config(),
    "one token per image": make_config(),
    "top-1": make_config(top_k=1, shared=0),
    "every expert for every token": make_config(routed=3, top_k=3),
    "many experts, most unrouted": make_config(routed=64, shared=0),
    "tanh": make_config(activation="tanh"),
}
CONFIGS["one token per image"] = CONFIGS["one token per image"].model_copy(
    update={"encoder": CONFIGS["one token per image"].encoder.model_copy(update={"patch": 8})}
)


CONFIGS["transformer"] = make_text_config()
CONFIGS["transformer without norms"] = make_text_config(norm="none")
CONFIGS |= FAMILY


def microbatch_truth(network: Network, batch) -> list[dict[str, torch.Tensor]]:
    """Gradient of every unit, run alone."""
    truth = []
    for unit in range(len(next(iter(batch.values())))):
        network.zero_grad()
        network.loss({name: tensor[unit : unit + 1] for name, tensor in batch.items()}).sum().backward()
        truth.append({name: p.grad.clone() for name, p in network.named_parameters()})
    network.zero_grad()
    return truth


def relative_error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    return float((actual - expected).norm() / expected.norm().clamp(min=1e-12))


def batch_with_repeats(units: int, config):
    """Random records; the second is a constant (its tokens repeat), the third equals the first."""
    batch, modality = dict(examples_for(config, units)), config.encoder.modality
    batch[modality] = batch[modality].clone()
    if units > 2:
        batch[modality][1] = 97 if modality == "text" else 0.5
        batch[modality][2] = batch[modality][0]
    return batch


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("units", [1, 7])
def test_hooks_gradients_equal_microbatches(name, units):
    network = build(CONFIGS[name], seed=3)
    batch = batch_with_repeats(units, CONFIGS[name])
    truth = microbatch_truth(network, batch)
    hooks = GradSampleHooks(network, loss_reduction="sum")
    network.loss(batch).sum().backward()
    for parameter_name, parameter in network.named_parameters():
        expected = torch.stack([unit[parameter_name] for unit in truth])
        assert parameter.grad_sample.shape == expected.shape
        assert relative_error(parameter.grad_sample, expected) < 1e-5, parameter_name
    hooks.cleanup()


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("units", [1, 7])
def test_ghost_norms_equal_microbatches(name, units):
    network = build(CONFIGS[name], seed=3)
    batch = batch_with_repeats(units, CONFIGS[name])
    truth = microbatch_truth(network, batch)
    hooks = GradSampleHooksFastGradientClipping(network, loss_reduction="sum")
    network.loss(batch).sum().backward()
    for parameter_name, parameter in network.named_parameters():
        expected = torch.stack([unit[parameter_name].norm() for unit in truth])
        assert relative_error(parameter._norm_sample, expected) < 1e-5, parameter_name
    hooks.cleanup()


def test_an_unrouted_expert_gets_exact_zeros_and_units_differ_in_which():
    network = build(CONFIGS["many experts, most unrouted"], seed=3)
    batch = make_batch(6)
    hooks = GradSampleHooks(network, loss_reduction="sum")
    chosen = network(batch).routing[0].experts_BTK
    for parameter in network.parameters():  # forget the forward pass that only looked
        parameter._forward_counter = 0
    for module in network.modules():
        vars(module).pop("activations", None)
    network.loss(batch).sum().backward()
    for layer in (network.blocks[0].moe.experts.up, network.blocks[0].moe.experts.down):
        for unit in range(6):
            routed = set(chosen[unit].flatten().tolist())
            for expert in range(64):
                gradient = layer.weight.grad_sample[unit, expert]
                assert (expert in routed) == bool(gradient.count_nonzero())
    hooks.cleanup()


def rows(lengths: list[list[int]], width: int = 8, out: int = 16):
    """Dispatched rows with ``lengths[expert][example]`` rows each, and a random output gradient."""
    generator = torch.Generator().manual_seed(5)
    example_N = torch.tensor([b for row in lengths for b, n in enumerate(row) for _ in range(n)], dtype=torch.int64)
    offsets_E = torch.tensor([sum(row) for row in lengths]).cumsum(0).to(torch.int32)
    rows_NI = torch.randn(len(example_N), width, generator=generator)
    delta_NO = torch.randn(len(example_N), out, generator=generator)
    return rows_NI, offsets_E, example_N, torch.arange(len(lengths[0])), delta_NO


def loop_truth(rows_NI, offsets_E, example_N, examples, delta_NO):
    truth = torch.zeros(examples, len(offsets_E), rows_NI.shape[1], delta_NO.shape[1])
    start = 0
    for expert, end in enumerate(offsets_E.tolist()):
        for row in range(start, end):
            truth[example_N[row], expert] += torch.outer(rows_NI[row], delta_NO[row])
        start = end
    return truth


LENGTHS = {
    "one row each": [[1, 1, 1], [1, 1, 1]],
    "one-row expert": [[0, 1, 0], [3, 0, 2]],
    "empty expert first, middle and last": [[0, 0, 0], [2, 1, 0], [0, 0, 0], [1, 4, 1], [0, 0, 0]],
    "example without rows": [[2, 0, 3], [1, 0, 1]],
    "all rows of one example": [[0, 6, 0], [0, 5, 0]],
    "no rows at all": [[0, 0, 0], [0, 0, 0]],
}


@pytest.mark.parametrize("name", LENGTHS)
def test_grouped_layer_samplers_equal_a_loop(name):
    rows_NI, offsets_E, example_N, example_B, delta_NO = rows(LENGTHS[name])
    layer = GroupedLinear(len(offsets_E), 8, 16)
    truth = loop_truth(rows_NI, offsets_E, example_N, len(example_B), delta_NO)
    activations = [rows_NI, offsets_E, example_N, example_B]
    gradient = grouped_linear_gradients(layer, activations, delta_NO)[layer.weight]
    norm = grouped_linear_norms(layer, activations, delta_NO)[layer.weight]
    torch.testing.assert_close(gradient, truth, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(norm, truth.flatten(1).norm(dim=1), rtol=1e-5, atol=1e-6)
    assert (gradient[truth == 0] == 0).all()  # exactly, not nearly


def test_a_permuted_row_to_unit_map_is_noticed():
    """The map decides attribution: the very checks above must reject the sampler under a wrong map."""
    rows_NI, offsets_E, example_N, example_B, delta_NO = rows(LENGTHS["one row each"])
    layer = GroupedLinear(2, 8, 16)
    truth = loop_truth(rows_NI, offsets_E, example_N, 3, delta_NO)
    wrong_N = example_N.roll(1)
    gradient = grouped_linear_gradients(layer, [rows_NI, offsets_E, wrong_N, example_B], delta_NO)[layer.weight]
    assert relative_error(gradient, truth) > 0.5
    norm = grouped_linear_norms(layer, [rows_NI, offsets_E, wrong_N, example_B], delta_NO)[layer.weight]
    assert relative_error(norm, truth.flatten(1).norm(dim=1)) > 1e-3


def test_an_empty_batch_has_no_gradients_and_raises_nothing():
    rows_NI, offsets_E, example_N, _, delta_NO = rows([[0], [0]])
    layer = GroupedLinear(2, 8, 16)
    activations = [rows_NI, offsets_E, example_N, torch.arange(0)]
    assert grouped_linear_gradients(layer, activations, delta_NO)[layer.weight].shape == (0, 2, 8, 16)
    assert grouped_linear_norms(layer, activations, delta_NO)[layer.weight].shape == (0,)


def test_ghost_norm_of_an_expert_survives_cancellation():
    # Two rows whose contributions nearly cancel. The Gram form computes a small difference of large numbers.
    x = torch.full((1, 8), 1000.0)
    rows_NI = torch.cat([x, x + 0.125])
    delta_NO = torch.cat([torch.ones(1, 16), -torch.ones(1, 16)])
    layer = GroupedLinear(1, 8, 16)
    activations = [rows_NI, torch.tensor([2], dtype=torch.int32), torch.tensor([0, 0]), torch.arange(1)]
    norm = float(grouped_linear_norms(layer, activations, delta_NO)[layer.weight])
    assert norm == pytest.approx(0.125 * (8 * 16) ** 0.5, rel=1e-5)
    gram = float(((rows_NI @ rows_NI.T) * (delta_NO @ delta_NO.T)).sum().clamp(min=0).sqrt())
    assert abs(gram - norm) > 0.1 * norm  # what Opacus's Linear sampler would have computed
