"""The run directory: created once, read back as written, damage said in one sentence."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from conclave.base.errors import BadInputError
from conclave.server.run_directory import RunDirectory
from conclave.server.scenario import read_scenario
from conclave.simulations.shipped import find


@pytest.fixture
def scenario():
    return read_scenario(find("digits"), {"seed": 5})


def test_what_was_written_is_read_back(tmp_path, scenario):
    created = RunDirectory.create(scenario, tmp_path / "a" / "run")
    run = RunDirectory.open(created.path)
    assert run.scenario == scenario
    assert run.environment["seed"] == 5
    assert run.mode == "simulation"
    assert run.environment["packages"]["torch"]
    assert run.ledgers == []
    lines = [{"round": 1, "accuracy": 0.1}, {"round": 2, "accuracy": 1 / 3}]
    for line in lines:
        run.append_metrics(line)
    assert run.metrics() == lines


def test_a_name_of_its_own_without_out(tmp_path, scenario, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = RunDirectory.create(scenario).path
    assert path.parent.name == "runs"
    assert path.name.startswith("digits-2")


def test_an_empty_directory_may_be_used_a_full_one_not(tmp_path, scenario):
    RunDirectory.create(scenario, tmp_path)
    before = (tmp_path / "scenario.toml").read_bytes()
    with pytest.raises(BadInputError, match="not empty, must be a new or empty directory"):
        RunDirectory.create(scenario, tmp_path)
    assert (tmp_path / "scenario.toml").read_bytes() == before


def test_a_file_in_the_way_is_bad_input(tmp_path, scenario):
    (tmp_path / "file").write_text("x")
    for out in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(BadInputError) as caught:
            RunDirectory.create(scenario, out)
        assert str(out) in str(caught.value)
        assert "\n" not in str(caught.value)


def test_what_is_no_run_directory_is_refused(tmp_path):
    for path in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(BadInputError, match=r"no scenario.toml here, must be a run directory"):
            RunDirectory.open(path)


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (None, "missing or damaged"),
        ('{"a": 1}\n{"b', "damaged"),
        ("", "empty"),
        ("1\n", "damaged"),
        ("[" * 100_000, "damaged"),
        ('{"round": ' + "9" * 5000 + "}", "damaged"),
        ('{"round": 1, "note": "\\ud800"}', "damaged"),
        ('{"round": 1}\n{}', "line 2: round: field required"),
        ('{"round": "1"}', "line 1: round: input should be a valid integer"),
        ('{"round": 1, "seconds": NaN}', "line 1: seconds: input should be a finite number"),
        ('{"round": 1, "bytes_full_model": 0}', "line 1: bytes_full_model: input should be greater"),
        ('{"round": 1, "refused": [1]}', "line 1: refused: input should be"),
        ('{"round": 1, "missing": ' + "9" * 400 + "}", "line 1: missing: input should be less"),
    ],
)
def test_damaged_metrics_are_bad_input(tmp_path, scenario, content, sentence):
    run = RunDirectory.create(scenario, tmp_path)
    if content is not None:
        (tmp_path / "metrics.jsonl").write_text(content)
    with pytest.raises(BadInputError, match=sentence):
        run.metrics()


NO_JSON = ["", "[]", "{", '{"a": "\ud800"}', '{"a": "\\ud800"}', "[" * 100_000, '{"a": ' + "9" * 5000 + "}"]


@pytest.mark.parametrize("content", [None, *NO_JSON], ids=lambda content: str(content)[:10])
def test_a_damaged_environment_is_bad_input(tmp_path, scenario, content):
    run = RunDirectory.create(scenario, tmp_path)
    path = tmp_path / "environment.json"
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    assert run.environment["seed"] == scenario.seed
    path.unlink()
    if content is not None:
        path.write_text(content, errors="surrogatepass")
    with pytest.raises(BadInputError, match=r"environment\.json: (damaged|cannot be read), must be"):
        _ = run.environment


def test_metrics_are_durable_once_they_are_written(tmp_path, scenario, monkeypatch):
    """The checkpoint after them is: it must not outlive them. At first the file's name has to last as well."""
    run, synced = RunDirectory.create(scenario, tmp_path), []
    monkeypatch.setattr(os, "fsync", lambda file: synced.append(Path(f"/proc/self/fd/{file}").readlink()))
    path = tmp_path / "metrics.jsonl"
    run.append_metrics({"round": 1})
    assert synced == [path, tmp_path]
    run.append_metrics({"round": 2})
    assert synced == [path, tmp_path, path]


def test_metrics_are_one_json_object_a_line(tmp_path, scenario):
    run = RunDirectory.create(scenario, tmp_path)
    for number in (1, 2, 3):
        run.append_metrics({"round": number, "text": "a\nb"})
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["round"] for line in lines] == [1, 2, 3]


def test_what_resuming_cannot_use_of_the_metrics_is_dropped_from_there_on(tmp_path, scenario):
    run = RunDirectory.create(scenario, tmp_path)
    for odd in ('{"round": "2"}', '{"round": 2, "holders": 3}', "[" * 100_000, '{"n": 2}', "null"):
        (tmp_path / "metrics.jsonl").write_text('{"round": 1}\n' + odd + '\n{"round": 3}\n')
        assert run.keep_metrics(3) == [{"round": 1}]
        assert (tmp_path / "metrics.jsonl").read_text() == '{"round": 1}\n'
