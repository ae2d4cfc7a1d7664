"""A step on made-up records: what it refuses, what it lets pass, and that it is done once."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import make_config, make_text_config
from router_samples import ROUTERS, router_config

from conclave.base.errors import BadInputError
from conclave.model.config import ModelConfig
from conclave.privacy.training import rehearsal
from conclave.privacy.training.dpsgd_mechanism import DpSgd
from conclave.privacy.training.rehearsal import rehearse

MECHANISM = DpSgd(steps=3, learning_rate=0.5, sampling_rate=0.1, clip=0.5, noise_multiplier=1.5, declared_size=100)
SAMPLES = str(Path(__file__).parents[2] / "samples")


@pytest.fixture(autouse=True)
def _samples(monkeypatch):
    monkeypatch.setattr(sys, "path", [SAMPLES, *sys.path])


def own(source: str) -> ModelConfig:
    document = make_config().model_dump() | {"preset": "own", "source": f"sample_models:{source}"}
    return ModelConfig.model_validate(document)


@pytest.mark.parametrize(
    ("source", "sentence"),
    [
        ("dropout", r"\(Dropout\) draws from one stream"),
        ("recurrent", r"\(LSTM\)"),
        ("stateful", "is a buffer, must not be"),
        ("loop", "the batch must stay the first axis"),
        ("lazy", "sample_models:lazy: 1.weight has no shape before the first batch"),
        ("no_file", "cannot be called: RuntimeError: weights are not there$"),
        ("seven", r"the scores of 7 examples are \[7, 7\] of torch.float32, must be floats \[7, 5\]"),
        ("whole_numbers", r"\[7, 5\] of torch.int64, must be floats \[7, 5\]"),
        ("too_wide", "training on 7 made-up records fails: RuntimeError: mat1 and mat2"),
        ("lost", "its loss is nan on every made-up record"),
        ("growing", "its forward pass changes own.weight, must change no state"),
        ("functional_dropout", "two passes over the same records differ"),
        ("remembering", "two passes over the same records differ"),
        ("centred", "a record's loss depends on the records beside it"),
        ("detached", "does not depend on any trained parameter"),
        ("frozen", "no parameter that can be trained"),
        ("leaving", r"leaving cannot be called: SystemExit: no\?\[31m$"),
        ("leaving_later", "ends the program: SystemExit: 3$"),
        ("speechless", "cannot be called: SpeechlessError$"),
        ("different", "builds another model each time"),
    ],
)
def test_what_a_model_alone_rules_out_is_one_sentence(source, sentence):
    with pytest.raises(BadInputError, match=sentence) as caught:
        rehearse(own(source), MECHANISM)
    assert "\n" not in str(caught.value)


def test_a_part_of_a_model_is_tried_by_itself():
    rehearse(own("only_all"), MECHANISM)
    with pytest.raises(BadInputError, match="made-up records fails: KeyError"):
        rehearse(own("only_all"), MECHANISM, {0: (1, 2)})


def test_without_privacy_only_what_does_not_run_is_refused():
    open_ = replace(MECHANISM, noise_multiplier=None)
    rehearse(own("dropout"), open_)
    with pytest.raises(BadInputError, match="must be floats"):
        rehearse(own("seven"), open_)


@pytest.mark.parametrize("changes", [{}, {"gradients": "hooks"}, {"numeric": "strict"}, {"load_share": 0.1}])
@pytest.mark.parametrize("config", [make_config(), make_text_config()])
def test_the_familys_models_pass_and_torchs_generator_is_left_alone(config, changes):
    before = torch.get_rng_state()
    assert rehearse(config, replace(MECHANISM, **changes)).example > 0
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("router", ROUTERS)
def test_every_router_passes_with_as_few_experts_as_a_token_needs(router):
    assert rehearse(router_config(router), MECHANISM).example > 0


def test_it_is_done_once_for_all_plans_of_a_kind(monkeypatch):
    rehearse(make_config(), MECHANISM)
    monkeypatch.setattr(rehearsal, "build", lambda *_: pytest.fail("it was built again"))
    other = replace(MECHANISM, steps=9, clip=3.0, noise_multiplier=7.0, declared_size=5)
    first = rehearse(make_config(), MECHANISM)
    assert rehearse(make_config(), other) == first == rehearse(make_config(), MECHANISM, {0: (1, 4, 5)})


def test_a_model_that_does_not_fit_into_memory_is_no_defect(monkeypatch):
    def no_memory(*_):
        raise RuntimeError("[enforce fail at alloc_cpu.cpp:127] DefaultCPUAllocator: can't allocate memory")

    monkeypatch.setattr(rehearsal, "_step", no_memory)
    with pytest.raises(BadInputError, match="model: training on 7 made-up records fails: RuntimeError"):
        rehearse(make_config(hidden=24), MECHANISM)
    monkeypatch.setattr(rehearsal, "_step", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        rehearse(make_config(hidden=24), MECHANISM)
