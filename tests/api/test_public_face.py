"""What ``import conclave`` offers: exactly that, nothing loaded before it is used, and every example as it is shown."""

from __future__ import annotations

import ast
import doctest
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

import conclave
from conclave.base.errors import BadInputError
from conclave.server.run_directory import RunDirectory
from conclave.server.scenario import read_scenario
from conclave.simulations.shipped import find

ROOT = Path(__file__).resolve().parents[2]
NAMES = ("Run", "Scenario", "audit_model", "load", "make_private", "simulate")
TINY = {"partition": {"nodes": 2}, "federation": {"rounds": 1}}


def test_these_names_are_offered_and_no_others():
    assert sorted(conclave.__all__) == sorted(NAMES)
    assert all(getattr(conclave, name).__name__ == name for name in NAMES)
    assert set(NAMES) <= set(dir(conclave))
    with pytest.raises(AttributeError, match="module 'conclave' has no attribute 'Simulate'"):
        conclave.Simulate  # noqa: B018


def test_type_checkers_are_told_where_they_really_come_from():
    for branch in ast.parse((ROOT / "src" / "conclave" / "__init__.py").read_text()).body:
        if isinstance(branch, ast.If) and ast.unparse(branch.test) == "TYPE_CHECKING":
            told = {alias.name: line.module for line in branch.body for alias in line.names}
    assert told == conclave._HOMES
    assert {name: getattr(conclave, name).__module__ for name in NAMES} == told


def test_nothing_is_loaded_before_it_is_used():
    code = (
        "import sys; before = set(sys.modules); import conclave\n"
        "loaded = {name.partition('.')[0] for name in set(sys.modules) - before}\n"
        "print(sorted(loaded - {'conclave'} - set(sys.stdlib_module_names)))\n"
        "print(sorted(name for name in sys.modules if name.startswith('conclave')))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == ["[]", "['conclave', 'conclave.base', 'conclave.base.silence']"]


@pytest.mark.parametrize("name", NAMES)
def test_every_example_runs_as_it_is_shown(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    offered = getattr(conclave, name)
    examples = [test for test in doctest.DocTestFinder(recurse=True).find(offered, name, globs={}) if test.examples]
    assert examples
    for example in examples:
        said: list[str] = []
        assert doctest.DocTestRunner().run(example, out=said.append).failed == 0, "".join(said)


def test_no_example_stands_where_none_is_run():
    files = [file for folder in (ROOT / "src" / "conclave").iterdir() for file in folder.resolve().rglob("*.py")]
    found = [file.relative_to(ROOT) for file in files if re.search(r"^ *>>> ", file.read_text(), re.MULTILINE)]
    shown = {".".join(("conclave", *file.with_suffix("").parts)) for file in found}
    assert shown == set(conclave._HOMES.values())


@pytest.mark.slow
def test_the_page_about_python_is_true(tmp_path, monkeypatch, capsys):
    """All its blocks one after the other, as a reader would run them."""
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "python.md").read_text(), re.DOTALL)
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {}
    for block in blocks:
        exec(compile(block, "python.md", "exec"), names)
    assert len(blocks) == 5
    assert list(names["scores"].shape) == [4, 10]
    assert names["audit"].verdict == "NOT_REFUTED"
    assert "NOT_REFUTED\nruns/short/report.html\n" in capsys.readouterr().out


def test_a_scenario_from_python_is_the_one_of_the_command_line(tmp_path):
    dotted = {"seed": 3, "federation.rounds": 5, "privacy.epsilon": 2.0, "evaluation.every": 5}
    expected = read_scenario(find("digits"), dotted)
    nested = {"federation": {"rounds": 5}, "privacy": {"epsilon": 2.0}, "evaluation": {"every": 5}}
    (tmp_path / "mine.toml").write_text(find("digits").read_text())
    for scenario in (
        conclave.Scenario.read("digits", seed=3, **nested),
        conclave.Scenario.read(tmp_path / "mine.toml", **dotted),
        conclave.Scenario.read("digits", seed=1).replace(seed=3, **nested),
    ):
        assert type(scenario) is conclave.Scenario
        assert scenario.to_toml() == expected.to_toml()
        assert scenario.plan().hash == expected.plan().hash


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return conclave.simulate(
        conclave.Scenario.read("digits", **TINY), seed=2, out=tmp_path_factory.mktemp("face") / "run"
    )


def test_a_run_is_what_it_left(run):
    assert run.scenario == conclave.Scenario.read("digits", seed=2, **TINY)
    assert run.metrics == [json.loads(line) for line in (run.path / "metrics.jsonl").read_text().splitlines()]
    assert run.ledgers == [run.path / "ledgers" / f"node-{number:04d}.db" for number in range(2)]
    assert run.summary.accuracy == run.metrics[-1]["accuracy"]
    assert 7.9 < run.summary.epsilon <= run.scenario.privacy.epsilon == 8.0
    weights = run.model().state_dict()
    again = conclave.load(str(run.path / "model")).state_dict()
    assert all(torch.equal(weights[name], again[name]) for name in weights)
    assert repr(run) == f"Run.open({str(run.path)!r})"
    report = run.report()
    assert report == run.path / "report.html"
    assert report.read_text().startswith("<!")


def test_a_run_that_is_resumed_goes_on_after_its_last_round(run):
    model, seen = (run.path / "model" / "model.safetensors").read_bytes(), []
    (run.path / "model" / "model.safetensors").unlink()
    assert conclave.Run.open(run.path).resume(on_round=seen.append).summary.rounds == 1
    assert seen == []  # nothing was left to do but the model
    assert (run.path / "model" / "model.safetensors").read_bytes() == model


def test_a_function_that_builds_a_model_is_called_again_for_a_fresh_one(monkeypatch):
    subjects, built = [], []
    monkeypatch.setattr("conclave.audit.model.audit_model", lambda subject: subjects.append(subject) or [])

    def build():
        built.append(nn.Linear(2, 2))
        return built[-1], lambda batch: built[-1](batch["x"]).sum(1), {"x": torch.zeros(20, 2)}

    conclave.audit_model(build, clip=0.5)
    (subject,) = subjects
    assert (subject.module, subject.examples, subject.mechanism.clip) == (built[0], 16, 0.5)
    assert subject.rebuild()[0] is built[1]


def deployed(folder: Path) -> conclave.Run:
    return conclave.Run(RunDirectory.create(conclave.Scenario.read("digits"), folder / "deployed", mode="deployment"))


LINEAR, ROWS = nn.Linear(2, 2), {"x": torch.zeros(8, 2)}


@pytest.mark.parametrize(
    ("ask", "sentence"),
    [
        (lambda here: conclave.Scenario.read("digit"), "did you mean digits"),
        (lambda here: conclave.Scenario.read("digits", privacy={"epsilom": 3}), "nearest known key is privacy.epsilon"),
        (lambda here: conclave.simulate("digits", worker=2), "worker"),
        (lambda here: conclave.simulate(conclave.Scenario.read("digits"), seed=-1), "scenario digits: seed is -1"),
        (lambda here: conclave.simulate("digits", engine="cloud"), "engine is 'cloud', must be 'inline' or 'ray'"),
        (lambda here: conclave.simulate("digits", workers=0), "workers is 0, must be at least 1 and at most 256"),
        (lambda here: conclave.simulate("digits", out=here), "must be a new or empty directory"),
        (lambda here: conclave.Run.open(here), "must be a run directory"),
        (lambda here: deployed(here).summary, "a run of real nodes"),
        (lambda here: conclave.load(here), "must be a folder that holds a saved model"),
        (lambda here: conclave.audit_model("digits", LINEAR), "must be given alone"),
        (lambda here: conclave.audit_model("digits-open"), "nothing to audit"),
        (lambda here: conclave.audit_model(LINEAR), "must be given both"),
        (lambda here: conclave.audit_model(LINEAR, LINEAR, {"x": torch.zeros(3, 2)}), "has 3, must be named tensors"),
        (lambda here: conclave.audit_model(LINEAR, LINEAR, ROWS, noise=2.0), "noise is no option, must be one of"),
        (lambda here: conclave.audit_model(LINEAR, LINEAR, ROWS, clip=-1.0), "clip is -1"),
        (lambda here: conclave.audit_model(lambda: 3), "<lambda> must return (module, example_loss"),
    ],
)  # fmt: skip
def test_bad_input_is_one_sentence(tmp_path, ask, sentence):
    (tmp_path / "something").touch()
    with pytest.raises(BadInputError) as caught:
        ask(tmp_path)
    assert sentence in str(caught.value)
    assert len(str(caught.value).splitlines()) == 1
