"""A run that is killed anywhere and resumed ends as if nothing had happened.

Each victim is a forked copy of this process. It counts its own Python calls and sends itself SIGKILL at a chosen
one, so the moments are spread over the whole run and every failure can be repeated.
"""

from __future__ import annotations

import json
import os
import random
import signal
import sys
from dataclasses import asdict

import pytest
from conftest import in_the_soak_unless
from ledger_samples import entries_of

from conclave.base.errors import BadInputError
from conclave.privacy.ledger.reading.history import LedgerFile
from conclave.privacy.ledger.reading.verification import audit_history
from conclave.server.run_directory import RunDirectory
from conclave.server.scenario import read_scenario
from conclave.simulations.shipped import find
from conclave.simulations.simulate import simulate

CHANGES = {
    "federation.rounds": 4,
    "partition.nodes": 3,
    "model.experts.hidden": 8,
    "model.width": 8,
    "federation.optimizer.momentum": 0.5,
    "evaluation": {"every": 2, "held_out": 0.3},
    "federation.noise_test": {},
}
KILLS = 20


def scenario():
    return read_scenario(find("digits"), CHANGES)


def events(directory):
    """Ledger entries without clock, hashes and repetitions of a crash."""
    clock = {"time", "prev_hash"}
    return [
        [{k: v for k, v in asdict(entry).items() if k not in clock} for entry in entries_of(path)]
        for path in (*directory.ledgers, *directory.held_out_ledgers)
    ]


def run_in_a_child(work, calls_before_death: int | None) -> tuple[int, int]:
    """Run ``work`` in a forked child; return its exit status and how many calls it made (if it lived)."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        calls = 0

        def count(frame, event, argument):
            nonlocal calls
            calls += event == "call"
            if calls == calls_before_death:
                os.kill(os.getpid(), signal.SIGKILL)

        try:
            sys.setprofile(count)
            work()
            sys.setprofile(None)
            os.write(writer, str(calls).encode())
            os._exit(0)
        except BaseException:
            os._exit(1)
    os.close(writer)
    with os.fdopen(reader) as stream:
        text = stream.read()
    _, status = os.waitpid(child, 0)
    return status, int(text or 0)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    run = RunDirectory.create(scenario(), tmp_path_factory.mktemp("resume") / "undisturbed")
    simulate(scenario(), run)
    return run


@pytest.fixture(scope="module")
def calls(tmp_path_factory) -> int:
    folder = tmp_path_factory.mktemp("resume") / "counted"
    run = RunDirectory.create(scenario(), folder)
    status, calls = run_in_a_child(lambda: simulate(scenario(), run), None)
    assert status == 0
    return calls


@pytest.mark.parametrize("kill", in_the_soak_unless(range(6), range(KILLS)))
def test_a_run_killed_anywhere_and_resumed_ends_the_same(undisturbed, calls, tmp_path, kill):
    generator = random.Random(kill)
    run = RunDirectory.create(scenario(), tmp_path / "run")
    deaths = 0
    for _ in range(generator.choice((1, 1, 2))):  # now and then the resumed run is killed too
        status, _ = run_in_a_child(lambda: simulate(run.scenario, run), generator.randrange(1, calls))
        deaths += os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL
    assert deaths > 0
    summary = simulate(RunDirectory.open(run.path).scenario, run)
    whole, again = undisturbed.path / "model", run.path / "model"
    assert (again / "model.safetensors").read_bytes() == (whole / "model.safetensors").read_bytes()
    assert [line["round"] for line in run.metrics()] == [1, 2, 3, 4]
    assert [line["loss"] for line in run.metrics()] == [line["loss"] for line in undisturbed.metrics()]
    measured = [line.get("private_evaluation") for line in run.metrics()]
    assert measured == [line.get("private_evaluation") for line in undisturbed.metrics()]
    assert events(run) == events(undisturbed)  # nothing lost, nothing doubled, nothing charged twice
    for path in run.ledgers:
        audit = audit_history(LedgerFile(path))
        assert audit.findings == []
        assert audit.epsilon == summary.epsilon <= 8.0


class StoppedError(Exception):
    pass


@pytest.mark.parametrize(
    "federation",
    [
        {"optimizer": {"kind": "adam", "learning_rate": 0.02, "schedule": "cosine", "decay": 0.9, "warmup_rounds": 2}},
        pytest.param(
            {"optimizer": {"kind": "adamw"}, "aggregation": {"kind": "trimmed-mean"}, "step_scale": "contributions"},
            marks=pytest.mark.slow,
        ),
        pytest.param(
            {"optimizer": {"kind": "adagrad"}, "aggregation": {"kind": "norm-bounded"}}, marks=pytest.mark.slow
        ),
        {"optimizer": {"kind": "sgd", "momentum": 0.9, "nesterov": True}, "aggregation": {"kind": "median"}},
    ],
)
def test_every_optimizer_resumes_where_it_was(federation, tmp_path):
    changed = CHANGES | {f"federation.{key}": value for key, value in federation.items()}
    del changed["federation.optimizer.momentum"]
    again = read_scenario(find("digits"), changed)
    whole, stopped = (RunDirectory.create(again, tmp_path / name) for name in ("whole", "stopped"))

    def stop(round_number):
        if round_number == 3:
            raise StoppedError

    simulate(again, whole)
    with pytest.raises(StoppedError):
        simulate(again, stopped, stop)
    simulate(again, stopped)
    models = [(run.path / "model" / "model.safetensors").read_bytes() for run in (whole, stopped)]
    assert models[0] == models[1]
    assert whole.checkpoint.read_bytes() == stopped.checkpoint.read_bytes()
    assert events(whole) == events(stopped)


def test_resuming_a_finished_run_changes_nothing(undisturbed):
    before = {path: path.read_bytes() for path in undisturbed.path.rglob("*.safetensors")}
    ledgers = events(undisturbed)
    simulate(undisturbed.scenario, undisturbed)
    assert {path: path.read_bytes() for path in undisturbed.path.rglob("*.safetensors")} == before
    assert events(undisturbed) == ledgers
    assert len(undisturbed.metrics()) == 4


def test_a_damaged_or_foreign_checkpoint_is_refused_in_one_sentence(tmp_path):
    run = RunDirectory.create(scenario(), tmp_path / "run")
    simulate(scenario(), run)
    whole = run.checkpoint.read_bytes()
    run.checkpoint.write_bytes(whole[:-10])
    with pytest.raises(BadInputError, match=r"round\.safetensors: missing or damaged, must be a checkpoint"):
        simulate(scenario(), run)
    run.checkpoint.write_bytes(whole)
    text = (run.path / "scenario.toml").read_text()
    (run.path / "scenario.toml").write_text(text.replace("epsilon = 8.0", "epsilon = 9.0"))
    with pytest.raises(BadInputError, match="belongs to another plan"):
        simulate(run.scenario, run)


@pytest.mark.parametrize("left", [None, 0, 1])
def test_a_run_whose_metrics_were_lost_goes_on_from_its_checkpoint(undisturbed, tmp_path, caplog, left):
    """A disk may lose what it said it kept. The model is that of an undisturbed run; counts are of what is known."""
    run = RunDirectory.create(scenario(), tmp_path / "run")

    def stop(round_number):
        if round_number == 3:
            raise StoppedError

    with pytest.raises(StoppedError):
        simulate(scenario(), run, stop)
    path = run.path / "metrics.jsonl"
    lines = path.read_bytes().splitlines(keepends=True)
    done, known = len(lines), left or 0
    path.unlink()
    if left is not None:
        path.write_bytes(b"".join(lines[:left]) + b"\xff\0\0\0")  # what a power cut may leave
    summary = simulate(scenario(), run)
    assert f"the metrics of {done - known} of {done} rounds are lost" in caplog.text
    assert summary.rounds == 4
    assert [line["round"] for line in run.metrics()] == [1, 2, 3, 4][:known] + [1, 2, 3, 4][done:]
    whole, again = (found.path / "model" / "model.safetensors" for found in (undisturbed, run))
    assert again.read_bytes() == whole.read_bytes()
    assert sum(map(len, run.metrics()[-1]["holders_mean"])) > 0
    assert events(run) == events(undisturbed)


def test_metrics_cut_short_by_a_crash_are_repaired(tmp_path):
    run = RunDirectory.create(scenario(), tmp_path / "run")
    path = run.path / "metrics.jsonl"
    path.write_text("".join(json.dumps({"round": n}) + "\n" for n in (1, 2, 3)) + '{"round": 4, "acc')
    assert run.keep_metrics(4) == [{"round": n} for n in (1, 2, 3)]
    assert [line["round"] for line in run.metrics()] == [1, 2, 3]
    run.keep_metrics(2)
    assert [line["round"] for line in run.metrics()] == [1, 2]
