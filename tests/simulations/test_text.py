"""The text scenario end to end, made small."""

from __future__ import annotations

import json
import math

import pytest

from conclave.base.errors import BadInputError
from conclave.privacy.ledger.reading.history import LedgerFile
from conclave.report.predict import Continuation, predict
from conclave.report.report import write_report
from conclave.server.run_directory import RunDirectory
from conclave.server.scenario import read_scenario
from conclave.simulations.shipped import find
from conclave.simulations.simulate import simulate

SMALL = {
    "federation.rounds": 2,
    "partition.nodes": 3,
    "model.width": 16,
    "model.experts.hidden": 8,
    "data.test_records": 60,
    "privacy.sampling_rate": 0.0005,
}


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    scenario = read_scenario(find("stdlib-text"), SMALL)
    run = RunDirectory.create(scenario, tmp_path_factory.mktemp("text") / "run")
    return simulate(scenario, run), run


def test_text_is_measured_in_bits_per_byte(finished):
    summary, run = finished
    assert summary.accuracy is None
    last = run.metrics()[-1]
    assert "accuracy" not in last
    assert summary.bits_per_byte == last["bits_per_byte"]
    assert 4.0 < last["order0_bits_per_byte"] < 5.0
    # the loss has no auxiliary part in evaluation: it is the same number in nats
    assert last["bits_per_byte"] == pytest.approx(last["loss"] / math.log(2))
    assert 0 < summary.epsilon <= 8
    assert len(last["load"]) == run.scenario.model.layers


def test_the_report_says_that_a_window_is_protected_and_no_more(finished):
    _, run = finished
    page = write_report(run).read_text()
    assert "one record (one window of 64 bytes: not a file, and not an author)" in " ".join(page.split())
    assert "Bits per byte per round" in page
    assert "order-0 entropy" in page


def test_a_prompt_is_continued(finished):
    _, run = finished
    one = predict(run.path, "import ", max_bytes=20, temperature=0.8, seed=1)
    again = predict(run.path, "import ", max_bytes=20, temperature=0.8, seed=1)
    other = predict(run.path, "import ", max_bytes=20, temperature=0.8, seed=2)
    assert isinstance(one, Continuation)
    assert one == again != other
    assert one.bytes_generated == 20
    assert 0 < len(one.text) <= 20  # bytes that are no UTF-8 can melt into one sign
    long_prompt = predict(run.path, "x" * 200, max_bytes=3)  # only the last window is context
    assert long_prompt.bytes_generated == 3


def test_a_low_temperature_takes_the_likeliest_byte(finished):
    _, run = finished
    degrees = [1e-4] * 4 + [1e-40, 5e-324]  # the last two are nothing in float32
    cold = {predict(run.path, "def ", max_bytes=8, temperature=t, seed=seed).text for seed, t in enumerate(degrees)}
    assert len(cold) == 1


@pytest.mark.parametrize(
    ("prompt", "options", "sentence"),
    [
        ("", {}, "the prompt is empty"),
        ("a", {"max_bytes": 0}, "--max-bytes is 0"),
        ("a", {"max_bytes": 65_537}, "--max-bytes is 65537"),
        ("a", {"temperature": 0.0}, "--temperature is 0"),
        ("a", {"temperature": float("nan")}, "--temperature is nan"),
        ("a", {"seed": 2**64}, "--seed is 18446744073709551616"),
        ("a", {"seed": -(2**63) - 1}, "--seed is -9223372036854775809"),
    ],
)
def test_what_cannot_be_continued_is_one_sentence(finished, prompt, options, sentence):
    with pytest.raises(BadInputError, match=sentence):
        predict(finished[1].path, prompt, **options)


def test_groups_and_labels_never_reach_a_node_that_has_no_use_for_them(finished):
    from conclave.simulations.simulated_nodes import open_simulated

    _, run = finished
    node = open_simulated(run.scenario.to_toml(), str(run.path), 0, 3)
    assert set(node.records) == {"text"}
    open_simulated.cache_clear()
    assert json.loads((run.path / "environment.json").read_text())["seed"] == 1


def test_groups_can_be_the_unit(tmp_path):
    """Whole packages as units: sampled as one, the ledger and the node's declared size count them."""
    changes = SMALL | {"privacy.unit": "group", "privacy.records_per_unit": 4, "privacy.sampling_rate": 0.5}
    scenario = read_scenario(find("stdlib-text"), changes)
    run = RunDirectory.create(scenario, tmp_path / "run")
    summary = simulate(scenario, run)
    assert 0 < summary.epsilon <= 8.0
    genesis = [LedgerFile(path).genesis for path in run.ledgers]
    assert {g.unit for g in genesis} == {"group"}
    from conclave.simulations.simulated_nodes import open_simulated

    node = open_simulated(run.scenario.to_toml(), str(run.path), 0, 3)
    packages = len(node.records["group"].unique())
    assert len(node.records["group"]) > packages >= node.declared_size >= packages * 0.95
