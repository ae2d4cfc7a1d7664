"""The report: self-contained, and it says what it must."""

from __future__ import annotations

import json
import re
import shutil

import pytest

from conclave.base.errors import BadInputError
from conclave.report.report import contents_of, write_report
from conclave.server.run_directory import RunDirectory
from conclave.server.scenario import read_scenario
from conclave.simulations.shipped import find
from conclave.simulations.simulate import simulate, summarize

FAST = {"federation.rounds": 2, "partition.nodes": 3}


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    scenario = read_scenario(find("digits"), FAST)
    run = RunDirectory.create(scenario, tmp_path_factory.mktemp("report") / "run")
    simulate(scenario, run)
    return run


@pytest.fixture(scope="module")
def page(directory):
    return write_report(directory).read_text()


@pytest.mark.parametrize(
    ("privacy", "level"),
    [({}, "fast: "), ({"gradients": "ghost"}, "uncertified: "), ({"numeric": "strict"}, "strict: ")],
)
def test_it_names_the_numeric_level(directory, tmp_path, privacy, level):
    changes = {f"privacy.{key}": value for key, value in privacy.items()}
    copy = tmp_path / "run"
    shutil.copytree(directory.path, copy)
    (copy / "scenario.toml").write_text(read_scenario(find("digits"), FAST | changes).to_toml())
    text = write_report(RunDirectory(copy)).read_text()
    assert f"<dd>{level}" in text


def test_it_loads_nothing_from_elsewhere(page):
    assert not re.findall(r"""(?:src|href)\s*=\s*["'](?!#)""", page)
    assert not re.findall(r"url\((?!#)", page)
    assert "<script" not in page


def test_it_shows_every_chart_and_every_node(page, directory):
    assert page.count("<svg") == 5
    assert page.count("holds</td>") == len(directory.ledgers) == 3
    for text in (
        "Accuracy per round",
        "Privacy spent per node",
        "Expert load",
        "Nodes that trained each expert",
        "Traffic against",
    ):
        assert text in page


def test_it_says_how_often_an_expert_had_no_holder(page, directory, tmp_path):
    assert "Every expert was trained in every round." in page
    copy = tmp_path / "run"
    shutil.copytree(directory.path, copy)
    lines = directory.metrics()
    lines[-1]["rounds_without_holder"] = [[0, 2, 0, 0, 1, 0, 0, 0]]
    (copy / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    text = write_report(RunDirectory(copy)).read_text()
    assert "an expert was trained by nobody 3 times" in text
    assert "2 × 0" in text
    for line in lines:  # as a version before this count left them
        for name in ("holders", "holders_mean", "rounds_without_holder"):
            del line[name]
    (copy / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert "Nodes that trained each expert" not in write_report(RunDirectory(copy)).read_text()


def test_it_says_whether_the_receipts_match_the_ledgers(page, directory, tmp_path):
    rounds = len(directory.metrics())
    assert f"Of {3 * rounds} receipts that nodes sent with their replies, {3 * rounds} match" in page
    copy = tmp_path / "copy"
    shutil.copytree(directory.path, copy)
    receipts = copy / "receipts.jsonl"
    receipts.write_text(receipts.read_text().replace('"round":1', '"round":2', 1))
    text = write_report(RunDirectory(copy)).read_text()
    assert "contradict each other" in text
    assert "the charge is of round 1" in text


def test_it_says_why_replies_were_dropped_and_which_rounds_changed_nothing(page, directory, tmp_path):
    assert "0 replies were dropped." in page
    assert "changed nothing" not in page
    copy = tmp_path / "copy"
    shutil.copytree(directory.path, copy)
    lines = directory.metrics()
    lines[0] |= {"dropped": 2, "dropped_by": {"replay": 1, "not-finite": 1}}
    lines[1] |= {"dropped": 2, "dropped_by": {"not-finite": 2}, "changed": False}
    (copy / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    text = write_report(RunDirectory(copy)).read_text()
    assert "4 replies were dropped: 3 not-finite, 1 replay." in text
    assert "1 of 2 rounds had too few acceptable replies and changed nothing" in text
    summary = summarize(RunDirectory(copy))
    assert (summary.dropped_by, summary.unchanged) == ({"not-finite": 3, "replay": 1}, 1)
    for line in lines:  # of a run from before reasons were told apart
        del line["dropped_by"], line["changed"]
    (copy / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert "4 replies were dropped: 4 other." in write_report(RunDirectory(copy)).read_text()


def test_it_states_the_claim_and_its_limits(page):
    for text in (
        "δ = 1e-05", "add or remove one", "Poisson-sampled DP-SGD", "numeric level", "assumed public",
        "releases without privacy", "This is a simulation", "composition of their ledgers",
    ):  # fmt: skip
        assert text in page, text
    assert "NO PRIVACY" not in page


def test_the_same_run_renders_the_same_bytes(directory, page):
    assert write_report(directory).read_text() == page


def test_a_run_without_privacy_wears_the_banner(tmp_path):
    scenario = read_scenario(find("digits"), FAST | {"privacy.mechanism": "none"})
    run = RunDirectory.create(scenario, tmp_path / "open")
    simulate(scenario, run)
    page = write_report(run).read_text()
    assert "NO PRIVACY" in page
    assert page.count("<svg") == 4
    assert ">inf<" in page


def test_an_unfinished_run_is_refused_in_one_sentence(directory, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(directory.path, copy)
    (copy / "metrics.jsonl").unlink()
    with pytest.raises(BadInputError, match=r"metrics\.jsonl"):
        write_report(RunDirectory(copy))
    with pytest.raises(BadInputError, match="must be a run directory"):
        RunDirectory.open(tmp_path)


def test_what_a_damaged_run_directory_lacks_is_named(directory, tmp_path):
    copy = tmp_path / "run"
    shutil.copytree(directory.path, copy)
    run, lines, environment = RunDirectory(copy), directory.metrics(), directory.environment

    def refused_with(where: str, what: str) -> None:
        with pytest.raises(BadInputError, match=rf"{where}: (missing or )?damaged, must .*as the run left it.*{what}"):
            write_report(run)

    for name in lines[0]:
        (copy / "metrics.jsonl").write_text(
            "".join(json.dumps({k: v for k, v in line.items() if k != name}) + "\n" for line in lines)
        )
        try:
            contents_of(run)
            summarize(run)
        except BadInputError as error:
            assert name in str(error)  # noqa: PT017  (either is right: whole, or a sentence that names it)
    for number, change, said in (
        (0, {"accuracy": "high"}, "line 1: accuracy"),
        (1, {"load": [[1.0]], "private_load": [[None, 2.0]]}, "line 2 are of other lengths"),
        (1, {"rounds_without_holder": [[0]]}, "line 2 are of other lengths"),
        (1, {"private_evaluation": {"metric": "accuracy"}}, "line 2: private_evaluation.over_units"),
    ):
        changed = [line | change if place == number else line for place, line in enumerate(lines)]
        (copy / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in changed))
        refused_with("metrics.jsonl", said)
    (copy / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    for name in ("started", "python", "platform", "commit", "packages"):
        (copy / "environment.json").write_text(json.dumps({k: v for k, v in environment.items() if k != name}))
        refused_with("environment.json", f"has no {name}")
    (copy / "environment.json").write_text(json.dumps(environment | {"packages": ["torch"]}))
    refused_with("environment.json", "packages is no mapping")
