"""The average over rounds against sums in float64; a run publishes it, goes on from the model itself, and resumes."""

from __future__ import annotations

import pytest
import torch
from pydantic import TypeAdapter
from safetensors.torch import load_file

from conclave.base.errors import BadInputError
from conclave.data.sources import load
from conclave.server.aggregate.averaging import ModelAverage
from conclave.server.aggregate.config import AverageConfig
from conclave.server.evaluate.public import evaluate
from conclave.server.rounds.checkpoint import read_checkpoint, write_checkpoint
from conclave.server.run_directory import RunDirectory
from conclave.server.scenario import read_scenario
from conclave.simulations.shipped import find
from conclave.simulations.simulate import simulate

ROUNDS = 7
CHANGES = {"federation.rounds": ROUNDS, "partition.nodes": 3, "model.experts.hidden": 8, "model.width": 8}
TAIL = 5
KINDS = [{"kind": "moving", "decay": 0.6}, {"kind": "tail", "share": 0.7}]


def average(rounds=ROUNDS, **config) -> ModelAverage:
    return ModelAverage(TypeAdapter(AverageConfig).validate_python(config), rounds)


def models(count=ROUNDS) -> list[dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(3)
    return [{n: torch.randn(4, 3, generator=generator) for n in ("shared/a", "expert/0/1/b")} for _ in range(count)]


def weighted(steps, weights):
    total = sum(weights)
    return {n: sum(w * step[n].double() for w, step in zip(weights, steps, strict=True)) / total for n in steps[0]}


def assert_is(found, expected):
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name].double(), tensor, rtol=0, atol=1e-6)


@pytest.mark.parametrize("decay", [0.0, 0.5, 0.95])
def test_a_moving_average_weighs_every_round_by_its_age_and_nothing_else(decay):
    averaged, steps = average(kind="moving", decay=decay), models()
    for number, step in enumerate(steps, 1):
        averaged.add(number, step)
        assert_is(averaged.of({}), weighted(steps[:number], [decay**age for age in reversed(range(number))]))


@pytest.mark.parametrize(
    ("rounds", "share", "last"), [(7, 1.0, 7), (7, 0.5, 4), (7, 0.4, 3), (7, 0.01, 1), (1, 0.5, 1), (25, 0.28, 7)]
)
def test_a_tail_average_is_the_mean_of_the_last_rounds_and_before_them_the_model_itself(rounds, share, last):
    averaged, steps = average(rounds, kind="tail", share=share), models(rounds)
    for number, step in enumerate(steps, 1):
        averaged.add(number, step)
        if number <= rounds - last:
            assert averaged.of(step) is step
        else:
            inside = steps[rounds - last : number]
            assert_is(averaged.of(step), weighted(inside, [1.0] * len(inside)))
    assert averaged.count == last


def test_an_expert_that_rests_counts_with_the_value_it_kept():
    averaged, steps = average(kind="tail", share=1.0), models(3)
    name = "expert/0/1/b"
    steps[1][name] = steps[0][name]  # nobody returned it in round 2
    for number, step in enumerate(steps, 1):
        averaged.add(number, step)
    expected = (2 * steps[0][name].double() + steps[2][name].double()) / 3
    torch.testing.assert_close(averaged.of({})[name].double(), expected, rtol=0, atol=1e-6)


def test_without_an_average_the_model_itself_is_published():
    averaged, (step,) = average(kind="none"), models(1)
    averaged.add(1, step)
    assert averaged.of(step) is step
    assert (averaged.count, averaged.tensors) == (0, {})


def test_it_keeps_its_own_copy():
    averaged, (first, second) = average(kind="moving", decay=0.5), models(2)
    kept = first["shared/a"].clone()
    averaged.add(1, first)
    averaged.add(2, second)
    assert torch.equal(first["shared/a"], kept)
    first["shared/a"].zero_()
    assert_is(averaged.of({}), weighted([{**first, "shared/a": kept}, second], [0.5, 1.0]))


@pytest.mark.parametrize("kind", KINDS)
def test_restored_it_continues_bit_for_bit(kind):
    whole, second, steps = average(**kind), average(**kind), models()
    for number, step in enumerate(steps, 1):
        whole.add(number, step)
        if number == 5:
            second.restore(whole.count, whole.tensors, step)
        elif number > 5:
            second.add(number, step)
    assert all(torch.equal(second.tensors[name], tensor) for name, tensor in whole.tensors.items())
    assert second.count == whole.count


@pytest.mark.parametrize(
    ("kind", "count", "kept"),
    [
        ({"kind": "none"}, 1, {"a": torch.zeros(2)}),
        ({"kind": "tail", "share": 1.0}, 1, {"a": torch.zeros(3)}),
        ({"kind": "tail", "share": 1.0}, 1, {}),
        ({"kind": "tail", "share": 1.0}, 0, {"a": torch.zeros(2)}),
        ({"kind": "tail", "share": 1.0}, -1, {"a": torch.zeros(2)}),
    ],
)
def test_another_average_is_refused(kind, count, kept):
    with pytest.raises(BadInputError, match="another average"):
        average(**kind).restore(count, kept, {"a": torch.zeros(2)})


@pytest.mark.parametrize(
    ("value", "sentence"),
    [
        ({"kind": "moving", "decay": 1.0}, "federation.average.decay is 1.0, must be less than 1"),
        ({"kind": "tail", "share": 0.0}, "federation.average.share is 0.0, must be greater than 0"),
        ({"kind": "ema"}, "federation.average.kind is 'ema', must be one of moving, none, tail"),
    ],
)
def test_a_wrong_key_is_refused_in_one_sentence(value, sentence):
    with pytest.raises(BadInputError) as caught:
        read_scenario(find("digits"), {"federation.average": value})
    assert sentence in str(caught.value)
    assert "\n" not in str(caught.value)


class StoppedError(Exception):
    pass


@pytest.fixture
def went_through(monkeypatch):
    """The checkpoint of every round, by its number."""
    kept = {}

    def write(path, checkpoint):
        kept[checkpoint.round] = {name: tensor.clone() for name, tensor in checkpoint.tensors.items()}
        write_checkpoint(path, checkpoint)

    monkeypatch.setattr("conclave.server.record.write_checkpoint", write)
    return kept


@pytest.mark.parametrize("kind", KINDS)
def test_a_run_publishes_the_average_of_the_models_it_went_through_and_resumes(kind, tmp_path, went_through):
    """A round that changed nothing, for want of replies, counts nothing."""
    cohort = {"federation.cohort": {"kind": "poisson", "rate": 0.6}, "federation.min_replies": 2}
    scenario = read_scenario(find("digits"), CHANGES | cohort | {"federation.average": kind})
    whole, stopped = (RunDirectory.create(scenario, tmp_path / name) for name in ("whole", "stopped"))
    simulate(scenario, whole)
    metrics = whole.metrics()
    changed = [line["round"] for line in metrics if line["changed"]]
    inside = [number for number in changed if kind["kind"] == "moving" or number > ROUNDS - TAIL]
    assert 2 <= len(inside) <= len(changed) < ROUNDS
    weights = [kind.get("decay", 1.0) ** age for age in reversed(range(len(inside)))]
    published = load_file(whole.path / "model" / "model.safetensors")
    assert_is(published, weighted([went_through[number] for number in inside], weights))
    assert any(not torch.equal(published[name], tensor) for name, tensor in went_through[ROUNDS].items())
    measured = evaluate(scenario.model, published, load(scenario.data).test)
    assert (metrics[-1]["loss"], metrics[-1]["accuracy"]) == (measured.loss, measured.accuracy)

    def stop(round_number):
        if round_number == changed[-1]:
            raise StoppedError

    with pytest.raises(StoppedError):
        simulate(scenario, stopped, stop)
    simulate(scenario, stopped)
    for path in ("model/model.safetensors", "checkpoint/round.safetensors"):
        assert (whole.path / path).read_bytes() == (stopped.path / path).read_bytes()


def test_nodes_go_on_from_the_model_itself_whatever_is_published(tmp_path, monkeypatch, went_through):
    monkeypatch.setattr("conclave.simulations.simulate.run_number", lambda scenario: 5)  # or the noise would be another
    runs = []
    for number, kind in enumerate(({"kind": "none"}, *KINDS)):
        scenario = read_scenario(find("digits"), CHANGES | {"federation.average": kind})
        run = RunDirectory.create(scenario, tmp_path / str(number))
        simulate(scenario, run)
        runs.append(dict(went_through))
        found = read_checkpoint(run.checkpoint)
        assert (found.averaged, bool(found.average)) == ((0, False), (ROUNDS, True), (TAIL, True))[number]
    for run_steps in runs[1:]:
        for number, step in runs[0].items():
            assert all(torch.equal(run_steps[number][name], tensor) for name, tensor in step.items())


def test_the_plan_and_its_hash_know_nothing_of_it():
    plain, averaged = (read_scenario(find("digits"), c) for c in ({}, {"federation.average": KINDS[0]}))
    assert averaged.plan().hash == plain.plan().hash
    written_out = read_scenario(find("digits"), {"federation.average": {"kind": "none"}})
    assert written_out.toml_for_hash() == plain.toml_for_hash() != averaged.toml_for_hash()
