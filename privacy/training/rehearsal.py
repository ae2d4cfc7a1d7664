"""A private step on made-up records, before anything is charged: whether a model can be trained, and what it takes.

Whatever a model and a plan alone decide is found here: layers that cannot be made private, scores of a wrong
shape, user code that fails, more memory than there is. What fails later, on records, depends on the records.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache

import torch

from conclave.base.errors import BadInputError
from conclave.model import parameters
from conclave.model.building import build
from conclave.model.config import ModelConfig
from conclave.model.experts.config import HeldExperts
from conclave.model.layers.unit_random import drawing_from
from conclave.model.network import Network
from conclave.model.own import said
from conclave.model.records import Batch
from conclave.privacy.gradients.physical_batch import TRIED, Footprint, measured
from conclave.privacy.randomness import per_unit_uniform
from conclave.privacy.training.config import PrivacyConfig
from conclave.privacy.training.dpsgd_mechanism import DpSgd
from conclave.privacy.training.local_optimizers import SgdConfig, make_optimizer
from conclave.privacy.training.private_training import PrivateTraining

_SEED = 0
_FEWER = 3
_REPEATED, _AMONG_OTHERS = 1e-5, 1e-2
"""What a record's loss may differ by, in a pass over the same batch and in one over another: by rounding, which in
bfloat16 shows with the size of a batch."""


def tried_mechanism(config: PrivacyConfig, noise_multiplier: float | None, load_share: float) -> DpSgd:
    """Return the mechanism for rehearsing a plan's training: only how it takes gradients matters."""
    return DpSgd.of(
        config,
        steps=1,
        learning_rate=1.0,
        optimizer=SgdConfig(),
        noise_multiplier=noise_multiplier,
        load_share=load_share,
        declared_size=1,
    )


def rehearse(model: ModelConfig, mechanism: DpSgd, held: HeldExperts | None = None) -> Footprint:
    """Train a model with fresh weights on made-up records, once per process for each kind of plan.

    Args:
        mechanism: what trains it, see :func:`tried_mechanism`. Only how it takes gradients counts.
        held: the experts it is trained with. By default as few as a token needs; all, of a model of the user's own.

    Returns:
        What examples take beside the model itself.

    Raises:
        BadInputError: the model cannot be built, or cannot be trained so; one sentence that says why.
    """
    if model.source is None and mechanism.gradients != "hooks":
        held = None  # a token visits as many experts however many are held, and nobody materialises the others
    if held is None:
        held = model.all_experts if model.source is not None else _fewest(model)
    # What has no say in whether a step succeeds is the same for all plans: it would only be done again.
    alike = DpSgd(
        steps=1,
        learning_rate=1.0,
        sampling_rate=1.0,
        clip=1.0,
        noise_multiplier=None if mechanism.noise_multiplier is None else 1.0,
        declared_size=TRIED,
        gradients=mechanism.gradients,
        numeric=mechanism.numeric,
        clipping="flat",
        load_share=0.5 if mechanism.load_share else 0.0,
    )
    return _rehearsed(model, alike, tuple(sorted(held.items())))


def _fewest(model: ModelConfig) -> HeldExperts:
    return {layer: tuple(range(model.experts.top_k)) for layer in range(model.layers)}


@lru_cache(maxsize=256)
def _rehearsed(model: ModelConfig, mechanism: DpSgd, held: tuple[tuple[int, tuple[int, ...]], ...]) -> Footprint:
    try:
        with torch.inference_mode(False), torch.enable_grad():  # whatever the caller is about
            network = build(model, _SEED, dict(held))
            if model.source is not None:
                _check_shapes(network)
            return _step(network, mechanism)
    except BadInputError:
        raise
    except Exception as error:
        if model.source is None and not _no_memory(error):
            raise  # a defect
        what = f"model.source {model.source}" if model.source is not None else "model"
        raise BadInputError(f"{what}: training on {TRIED} made-up records fails: {said(error)}") from error


def _no_memory(error: Exception) -> bool:
    return isinstance(error, MemoryError) or "can't allocate memory" in str(error)


def _step(network: Network, mechanism: DpSgd) -> Footprint:
    """Run one physical batch and leave out what follows it, noise and update: these know shapes alone."""
    batch = network.synthetic_batch(TRIED, _SEED)
    before = {name: p.detach().clone() for name, p in network.named_parameters()}
    network.eval()
    with torch.inference_mode():  # first: what goes wrong here has a plainer cause than what goes wrong in a step
        loss_B = network.task_loss(network(batch), batch)
    _check_untouched(network, before)
    if not bool(loss_B.isfinite().any()):
        raise BadInputError(
            f"model: its loss is {float(loss_B[0])} on every made-up record before any training, must be finite"
        )
    if not any(p.requires_grad for p in network.parameters()):
        raise BadInputError("model: it has no parameter that can be trained, must have one")
    optimizer = make_optimizer(network, mechanism.optimizer, mechanism.learning_rate)
    if mechanism.noise_multiplier is None:
        network.train()
        found = measured(lambda: network.loss(batch).sum().backward(), network, grams=False)
    else:
        with PrivateTraining(network, optimizer, network.loss, mechanism, bytes(32)) as training:
            found = training.footprint(batch)
        if network.config.source is not None:
            _check_alike(network, batch)
    _check_untouched(network, before)
    return found


def _check_shapes(network: Network) -> None:
    """Refuse a function that builds one model here and another there."""
    here = {name: t.shape for name, t in parameters.split(network.state_dict(), network.held).items()}
    if here != parameters.shapes(network.config, network.held):
        raise BadInputError(
            f"model.source {network.config.source} builds another model each time, must give the same parameters"
        )


def _check_alike(network: Network, batch: Batch) -> None:
    """Refuse a model whose loss of a record depends on anything but the record: draws, earlier passes, or others.

    Draws of ``conclave.model.layers.unit_random`` are a record's own and stay the same here.
    """
    network.train()
    once, again = (_losses(network, batch, seed) for seed in (_SEED, _SEED + 1))
    if not _near(once, again, _REPEATED):
        raise BadInputError(
            "model: two passes over the same records differ, must not: draw with "
            "conclave.model.layers.unit_random, and keep nothing "
            "from one pass for the next"
        )
    fewer = {name: tensor[:_FEWER] for name, tensor in batch.items()}
    try:
        among_fewer = _losses(network, fewer, _SEED)
    except Exception:  # of batches of one size alone: the step that follows tells
        return
    if not _near(once[:_FEWER], among_fewer, _AMONG_OTHERS):
        raise BadInputError(
            "model: a record's loss depends on the records beside it, must not: normalise and route each by itself"
        )


def _losses(network: Network, batch: Batch, seed: int) -> torch.Tensor:
    """Return the losses of a pass, with ``seed`` for draws from streams that all records share."""

    def draw(examples: int, values: int) -> torch.Tensor:
        return per_unit_uniform(bytes(32), 0, torch.arange(examples), values)

    with torch.random.fork_rng(devices=[]), torch.inference_mode(), drawing_from(draw):
        torch.manual_seed(seed)
        return network.loss(batch)


def _near(one: torch.Tensor, other: torch.Tensor, tolerance: float) -> bool:
    return torch.allclose(one, other, rtol=tolerance, atol=tolerance, equal_nan=True)


def _check_untouched(network: Network, before: Mapping[str, torch.Tensor]) -> None:
    after = dict(network.named_parameters())
    for name in before.keys() | after.keys():
        if name not in before or name not in after or not _same_bits(before[name], after[name]):
            raise BadInputError(f"model: its forward pass changes {name}, must change no state")


def _same_bits(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Whether two tensors are equal, with NaN equal to itself."""
    return torch.equal(one.detach().flatten().view(torch.uint8), other.detach().flatten().view(torch.uint8))
