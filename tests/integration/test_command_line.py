"""The command line as a user sees it: exit status, one sentence for bad input, one JSON object at the end."""

from __future__ import annotations

import io
import json
import math
import os
import shutil
import sqlite3
import stat
import subprocess
import sys
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from unittest import mock

import jsonschema
import pytest

import conclave.cli.main
from conclave.cli.output import print_json
from conclave.deployment.host.alone import alone
from conclave.simulations.shipped import find


def status_of(*arguments) -> int:
    """Run the command line in this process; return its exit status."""
    with mock.patch.object(sys, "argv", ["conclave", *map(str, arguments)]):
        try:
            conclave.cli.main.main()
        except SystemExit as stop:
            return stop.code or 0
    return 0


def call(capsys, *arguments) -> tuple[int, str, str]:
    """Run the command line in this process; return exit status, stdout, stderr."""
    status = status_of(*arguments)
    captured = capsys.readouterr()
    return status, captured.out, captured.err


FAST = ("--set", "federation.rounds=2", "--set", "partition.nodes=3")


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder, out, err = tmp_path_factory.mktemp("cli") / "run", io.StringIO(), io.StringIO()
    with redirect_stdout(out), redirect_stderr(err):
        status = status_of("simulate", "digits", *FAST, "--out", folder, "--json")
    assert status == 0, err.getvalue()
    return folder, out.getvalue(), err.getvalue()


def test_simulate_ends_with_one_json_object_and_leaves_a_report(run):
    folder, out, err = run
    result = json.loads(out.splitlines()[-1])
    assert {"accuracy", "epsilon", "delta", "rounds", "bytes_per_node", "run"} <= result.keys()
    assert (result["rounds"], result["delta"], result["run"]) == (2, 1e-5, str(folder))
    assert 0 < result["epsilon"] <= 8
    assert (folder / "report.html").is_file()
    assert err == ""  # no progress bar where there is no terminal


def test_a_baseline_is_one_flag_and_says_which_it_is(capsys, tmp_path):
    folder = tmp_path / "dense"
    status, out, _ = call(capsys, "simulate", "digits", *FAST, "--baseline", "dense-total", "--out", folder, "--json")
    result = json.loads(out.splitlines()[-1])
    assert status == 0
    assert result["baseline"] == json.loads((folder / "baseline.json").read_text())
    assert result["baseline"] == {
        "kind": "dense-total",
        "of": "digits",
        "parameters": 37568,
        "parameters_wanted": 38016,
    }
    assert "37,568 parameters for 38,016, 98.8%" in out
    assert "Baseline of digits: dense, 256 hidden values" in (folder / "report.html").read_text()
    status, out, _ = call(capsys, "simulate", "--resume", folder, "--json")
    assert json.loads(out.splitlines()[-1])["baseline"] == result["baseline"]


def test_audit_passes_a_true_ledger_and_exits_1_on_a_forged_one(run, capsys, tmp_path):
    folder, *_ = run
    status, out, _ = call(capsys, "audit", "ledger", folder, "--json")
    result = json.loads(out.splitlines()[-1])
    assert (status, result["verdict"], len(result["ledgers"])) == (0, "NOT_REFUTED", 3)
    forged = tmp_path / "forged.db"
    with sqlite3.connect(folder / "ledgers" / "node-0001.db") as source, sqlite3.connect(forged) as copy:
        source.backup(copy)
        copy.execute("DROP TRIGGER entries_never_change")
        copy.execute("UPDATE entries SET body = json_set(body, '$.rdp_charge', '1') WHERE seq = 2")
    status, out, _ = call(capsys, "audit", "ledger", forged, "--json")
    result = json.loads(out.splitlines()[-1])
    assert (status, result["verdict"]) == (1, "VIOLATED")
    assert any("charged 1, must be at least" in text for text in result["ledgers"][str(forged)]["findings"])


def test_audit_model_passes_a_scenario_and_exits_1_on_a_violation(capsys, tmp_path, monkeypatch):
    status, out, _ = call(capsys, "audit", "model", "digits", "--json")
    result = json.loads(out.splitlines()[-1])
    assert (status, result["verdict"]) == (0, "NOT_REFUTED")
    assert len(result["findings"]) == 9
    (tmp_path / "own_models.py").write_text(OWN_MODELS)
    monkeypatch.chdir(tmp_path)
    status, out, _ = call(capsys, "audit", "model", "own_models:coupled", "--json")
    result = json.loads(out.splitlines()[-1])
    assert (status, result["verdict"]) == (1, "VIOLATED")
    violated = {finding["check"] for finding in result["findings"] if finding["violation"]}
    assert "isolation" in violated
    for path, sentence in (
        ("own_models:nothing", "cannot be called"),
        ("no_such_module:build", "cannot be called"),
        ("own_models:number", "must return (module, example_loss, batch"),
        ("digits-open", "nothing to audit"),
    ):
        status, _, err = call(capsys, "audit", "model", path)
        assert status == 2
        assert sentence in err
        assert len(err.splitlines()) == 1


OWN_MODELS = """
import torch
from torch import nn


def coupled():
    module = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 1))

    def loss(batch):
        y = module(batch["x"]).squeeze(1)
        return (y - y.mean()).square()

    return module, loss, {"x": torch.randn(8, 6, generator=torch.Generator().manual_seed(1))}


def number():
    return 3
"""


def test_an_exceeded_budget_is_a_violation(run, capsys, tmp_path):
    folder, *_ = run
    poor = tmp_path / "poor.db"
    with sqlite3.connect(folder / "ledgers" / "node-0000.db") as source, sqlite3.connect(poor) as copy:
        source.backup(copy)
        (document,) = copy.execute("SELECT document FROM genesis").fetchone()
        genesis = json.loads(document) | {"epsilon": "4", "rdp_budget": "1"}
        copy.execute("UPDATE genesis SET document = ?", (json.dumps(genesis),))
    status, out, _ = call(capsys, "audit", "ledger", poor)
    assert status == 1
    assert "spends more than the budget of 4" in " ".join(out.split())


def test_report_predict_scenarios_and_version(run, capsys):
    folder, *_ = run
    (folder / "report.html").unlink()
    status, out, _ = call(capsys, "report", folder, "--json")
    assert status == 0
    assert json.loads(out.splitlines()[-1]) == {"report": str(folder / "report.html")}
    status, out, _ = call(capsys, "predict", folder, "digits:5", "--json")
    assert status == 0
    assert json.loads(out.splitlines()[-1])["label"] in range(10)
    status, out, _ = call(capsys, "scenarios", "--json")
    assert status == 0
    assert "digits" in json.loads(out.splitlines()[-1])["scenarios"]
    assert call(capsys, "--version")[1].startswith("conclave ")


def test_plan_shows_the_cost_before_anything_runs(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    status, out, _ = call(capsys, "plan", "digits", "--set", "federation.rounds=5", "--json")
    result = json.loads(out.splitlines()[-1])
    assert status == 0
    assert (result["rounds"], result["delta"]) == (5, 1e-5)
    assert 7.9 < result["epsilon"] <= 8
    assert {"noise_multiplier", "accountants", "bytes_down", "bytes_up", "steps", "seconds_total"} <= result.keys()
    assert list(tmp_path.iterdir()) == []


def test_resume_continues_from_the_command_line_and_takes_nothing_else(run, capsys):
    folder, *_ = run
    model = (folder / "model" / "model.safetensors").read_bytes()
    (folder / "model" / "model.safetensors").unlink()
    status, out, _ = call(capsys, "simulate", "--resume", folder, "--json")
    assert status == 0
    assert json.loads(out.splitlines()[-1])["rounds"] == 2
    assert (folder / "model" / "model.safetensors").read_bytes() == model


BAD = [
    (("simulate", "digit"), "did you mean digits"),
    (("simulate", "missing.toml"), "missing.toml: no such file"),
    (("simulate", "digits", "--set", "privacy.epsilom=3"), "nearest known key is privacy.epsilon"),
    (("simulate", "digits", "--set", "privacy.epsilon=0"), "privacy.epsilon is 0"),
    (("simulate", "digits", "--set", "privacy.delta=1"), "privacy.delta is 1"),
    (("simulate", "digits", "--set", "privacy.sampling_rate=1.5"), "privacy.sampling_rate is 1.5"),
    (("simulate", "digits", "--set", "federation.experts_per_node=9"), "at most model.experts.routed 8"),
    (("simulate", "digits", "--set", "federation.experts_per_node=0"), "federation.experts_per_node is 0"),
    (("simulate", "digits", "--set", "federation.experts_per_node=1"), "at most federation.experts_per_node 1"),
    (("simulate", "digits", "--set", "privacy"), "key.subkey=value"),
    (("simulate", "digits", "--set", "seed=x.y.z"), "seed is 'x.y.z'"),
    (("simulate", "digits", "--set", "partition.nodes=5000"), "at most the 1437 training records"),
    (("simulate", "digits", "--set", "partition.min_records=800"), "fewer nodes or a milder skew"),
    (("simulate", "digits", "--resume", "nowhere"), "cannot be combined with the scenario argument"),
    (("simulate", "--resume", "nowhere", "--seed", "3"), "cannot be combined with --seed"),
    (("simulate", "--resume", "nowhere"), "must be a run directory"),
    (("simulate", "digits", "--engine", "cloud"), "--engine is cloud, must be inline or ray"),
    (("simulate", "digits", "--baseline", "median"), "must be one of central, alone, dense-total, dense-active"),
    (("simulate", "--resume", "nowhere", "--baseline", "central"), "cannot be combined with --baseline"),
    (("simulate", "digits", "--baseline", "alone", "--engine", "ray"), "--baseline alone: cannot be combined with"),
    (("simulate", "digits", "--set", "federation.min_holders=6"), "hold 40 places, 8 experts × min_holders 6 need 48"),
    (("plan", "digit"), "did you mean digits"),
    (("report", "nowhere"), "must be a run directory"),
    (("predict", "nowhere", "digits:0"), "must be a folder that holds a saved model"),
    (("audit", "ledger", "nowhere.db"), "nowhere.db: cannot be read"),
    (("audit", "ledger", "."), "holds no ledger"),
    (("simulate", "digits", "--set", f"seed={'9' * 5001}"), "--set seed: an integer is too long"),
    (("simulate", "digits", "--set", f"a={'[' * 3000}"), "--set a: nested too deeply"),
    (("report", ""), "argument 2: is empty, must be a value"),
    (("node", "init", "n", "--data", ""), "argument 5: is empty"),
    (("simulate", "digits", "--out="), "--out=: is empty, must be a value; perhaps a variable of the shell is not set"),
    (("node", "check", "caf\udce9"), "argument 'caf\\udce9': is no text in UTF-8"),
    (("server", "init", "fed", "--host", "fed", "--port", "9091"), "internal_port is 9091, must be another than port"),
]


@pytest.mark.parametrize(("arguments", "sentence"), BAD, ids=lambda value: value if isinstance(value, str) else None)
def test_bad_input_is_one_sentence_and_status_2(capsys, tmp_path, monkeypatch, arguments, sentence):
    monkeypatch.chdir(tmp_path)
    status, out, err = call(capsys, *arguments)
    assert status == 2
    assert sentence in err
    assert err.startswith("conclave: ")
    assert err.count("\n") == 1
    assert "Traceback" not in err
    assert out == ""


def test_a_folder_that_may_not_be_read_is_not_one_without_ledgers(capsys, tmp_path, monkeypatch):
    def refuse(path):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(Path, "iterdir", refuse)  # root may read everything
    assert call(capsys, "audit", "ledger", tmp_path) == (2, "", f"conclave: {tmp_path}: Permission denied\n")


@pytest.mark.parametrize("command", [("stop",), ("server", "remove")])
@pytest.mark.parametrize("number", [str(2**64), "9" * 5000])
def test_ids_have_64_bits(capsys, command, number):
    status, _, err = call(capsys, *command, number, "--superlink", "nowhere")
    assert (status, "Invalid value" in err) == (2, True)
    status, _, err = call(capsys, *command, str(2**64 - 1), "--superlink", "nowhere")
    assert (status, err.startswith("conclave: --superlink nowhere")) == (2, True)


def test_a_non_empty_out_is_refused_and_left_alone(capsys, tmp_path):
    (tmp_path / "precious").write_text("keep me")
    status, _, err = call(capsys, "simulate", "digits", "--out", tmp_path)
    assert status == 2
    assert "must be a new or empty directory" in err
    assert [path.name for path in tmp_path.iterdir()] == ["precious"]


def loaded_by(*commands: tuple[str, ...]) -> list[set[str]]:
    """Run commands one after the other in one new process; return all that each and those before it have loaded."""
    code = f"""
import json, sys, conclave.cli.main
for command in {commands!r}:
    sys.argv = ["conclave", *command]
    try:
        conclave.cli.main.main()
    except SystemExit:
        pass
    print(json.dumps([name for name in sys.modules if "." not in name]), file=sys.__stderr__)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return [set(json.loads(line)) for line in done.stderr.splitlines() if line.startswith("[")]


HEAVY = {"torch", "flwr", "opacus", "dp_accounting", "scipy", "sympy", "datasets", "sklearn", "matplotlib", "pandas"}
NOT_FOR_READING = HEAVY - {"torch", "flwr", "dp_accounting", "scipy"}
IMPORT_NOTHING_HEAVY = (("--help",), ("--version",), ("audit", "--help"), ("node", "init", "--help"))
IMPORT_NO_TRAINING = (
    ("simulate", "digits", "--engine", "cloud"), ("simulate", "--resume", "nowhere", "--seed", "3"), ("scenarios",),
    ("simulate", "digit"), ("plan", "digit"), ("audit", "model", "digit"), ("schema", "receipt"), ("health", "nowhere"),
    ("status", "--superlink", "nowhere"), ("server", "unit", "nowhere"), ("audit", "ledger", "nowhere"),
    ("audit", "run", "nowhere"), ("node", "budget", "nowhere"), ("node", "check", "nowhere"),
    *(("node", command, "nowhere") for command in ("unit", "approve", "pause", "resume", "claim", "restore", "start")),
)  # fmt: skip
"""Each ends in a sentence or a list, once it has loaded what it needs. Opacus takes longer to load than all else."""


def test_a_command_imports_no_library_that_it_does_not_need():
    needless = [HEAVY | {"pydantic"}] * len(IMPORT_NOTHING_HEAVY) + [NOT_FOR_READING] * len(IMPORT_NO_TRAINING)
    commands = (*IMPORT_NOTHING_HEAVY, *IMPORT_NO_TRAINING)
    for command, libraries, loaded in zip(commands, needless, loaded_by(*commands), strict=True):
        assert not libraries & loaded, command


def test_audit_of_an_export_against_witness_and_receipts(run, capsys, tmp_path):
    folder, *_ = run
    ledger, export = folder / "ledgers" / "node-0001.db", tmp_path / "one.jsonl"
    assert call(capsys, "node", "export", ledger, export)[0] == 0
    assert stat.S_IMODE(export.stat().st_mode) == 0o600
    status, out, _ = call(capsys, "audit", "ledger", export, "--receipts", folder / "receipts.jsonl", "--json")
    result = json.loads(out.splitlines()[-1])["ledgers"][str(export)]
    assert (status, result["charges"], result["receipts"], result["findings"]) == (0, 2, 2, [])
    witness = tmp_path / "witness"
    head = json.loads(export.read_text().splitlines()[-1])
    witness.write_text(json.dumps(head))
    assert call(capsys, "audit", "ledger", export, "--witness", witness)[0] == 0
    witness.write_text(json.dumps(head | {"seq": head["seq"] + 1}))
    assert call(capsys, "audit", "ledger", export, "--witness", witness)[0] == 1
    status, _, err = call(capsys, "audit", "ledger", folder, "--witness", witness)
    assert (status, err.count("belongs to one ledger")) == (2, 1)
    status, _, err = call(capsys, "node", "export", ledger, export)
    assert (status, err.count("must be a new file")) == (2, 1)


def test_a_model_of_ones_own_is_found_where_the_caller_is(tmp_path):
    """In a process of its own: what the test's process can import proves nothing."""
    source = Path(__file__).parents[1] / "samples" / "sample_models.py"
    shutil.copy(source, tmp_path / "my_models.py")
    own = ("--set", "model.preset=own", "--set", "model.source=my_models:mixture")
    done = subprocess.run(
        [Path(sys.executable).with_name("conclave"), "simulate", "digits", *FAST, *own, "--out", "run", "--json"],
        capture_output=True, text=True, cwd=tmp_path, check=False,
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (0, "")  # nor do the libraries chatter when they are loaded
    assert json.loads(done.stdout.splitlines()[-1])["rounds"] == 2


def test_a_run_of_a_model_of_ones_own_is_resumed_where_the_caller_is(capsys, tmp_path, monkeypatch):
    source = Path(__file__).parents[1] / "samples" / "sample_models.py"
    (tmp_path / "here").mkdir()
    shutil.copy(source, tmp_path / "here" / "resumed_models.py")
    own = ("--set", "model.preset=own", "--set", "model.source=resumed_models:mixture")
    monkeypatch.chdir(tmp_path / "here")
    paths = [path for path in sys.path if path]  # an empty one is where the caller is

    def call_afresh(*arguments) -> tuple[int, str, str]:
        """As a new process would, which has not loaded the model."""
        monkeypatch.setattr(sys, "path", list(paths))
        monkeypatch.delitem(sys.modules, "resumed_models", raising=False)
        return call(capsys, *arguments)

    status, _, err = call_afresh("simulate", "digits", *FAST, *own, "--out", "run")
    assert (status, err) == (0, "")
    status, out, err = call_afresh("simulate", "--resume", "run", "--json")
    assert (status, json.loads(out.splitlines()[-1])["rounds"]) == (0, 2), err
    status, _, err = call_afresh("predict", "run", "digits:3")
    assert (status, err.count("must be built by it")) == (2, 1)
    monkeypatch.chdir(tmp_path)
    status, _, err = call_afresh("simulate", "--resume", "here/run")
    assert (status, "resumed_models" in err, len(err.splitlines())) == (2, True, 1)


def test_the_model_of_a_scenario(capsys, tmp_path):
    status, out, _ = call(capsys, "model", "stdlib-text", "--plot", tmp_path / "m.svg", "--json")
    card = json.loads(out.splitlines()[-1])
    assert (status, card["layers"], card["routed"], card["top_k"]) == (0, 1, 8, 2)
    assert sum(card["costs"]["parameters"].values()) == card["costs"]["total"] > card["costs"]["active"]
    assert all(len(ids["0"]) == 4 for ids in card["held"].values())
    assert card["bytes_down"] + card["bytes_up"] < card["bytes_full_model"]
    assert (tmp_path / "m.svg").read_text().startswith("<svg")
    status, _, err = call(capsys, "model", "digits", "--plot", tmp_path / "no" / "m.svg")
    assert (status, err.count("cannot be written")) == (2, 1)


def test_audit_run(run, capsys, tmp_path):
    folder, *_ = run
    status, out, _ = call(capsys, "audit", "run", folder, "--json")
    result = json.loads(out.splitlines()[-1])
    assert (status, result["verdict"], result["receipts"], result["matched"]) == (0, "NOT_REFUTED", 6, 6)
    copy = tmp_path / "copy"
    shutil.copytree(folder, copy)
    (copy / "ledgers" / "node-0002.db").unlink()
    status, out, _ = call(capsys, "audit", "run", copy, "--json")
    assert (status, json.loads(out.splitlines()[-1])["verdict"]) == (0, "INCOMPLETE")
    assert call(capsys, "audit", "run", copy, "--ledger", folder / "ledgers" / "node-0002.db")[0] == 0
    receipts = copy / "receipts.jsonl"
    receipts.write_text(receipts.read_text().replace('"round":1', '"round":2', 1))
    assert call(capsys, "audit", "run", copy)[0] == 1


def test_the_budget_of_a_ledger(run, capsys, tmp_path):
    folder, *_ = run
    ledger = folder / "ledgers" / "node-0000.db"
    status, out, _ = call(
        capsys, "node", "budget", ledger, "--plan", "digits", "--plot", tmp_path / "b.svg", "--json"
    )  # fmt: skip
    report = json.loads(out.splitlines()[-1])
    assert status == 0
    budget, planned = report["budget"], report["planned"]
    assert 7.9 < budget["spent"] <= budget["epsilon"] == 8.0
    assert [item["charges"] for item in budget["runs"]] == [2]
    assert len(budget["curve"]) == 2
    assert planned["forecast"]["charges"] == 60
    assert planned["refused"] == "the budget does not suffice"
    assert "would be refused" in out
    assert (tmp_path / "b.svg").read_text().startswith("<svg")
    status, _, err = call(capsys, "node", "budget", ledger, "--plan", "digits-open")
    assert (status, err.count("trains without privacy")) == (2, 1)


def test_a_node_that_holds_units_out(capsys, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data").mkdir()
    decisions = (
        "--dataset", "ward-7", "--data", "data", "--declared-size", 1400, "--epsilon", 8, "--delta", 1e-5,
        "--witness", "elsewhere/head", "--machine", "here", "--held-out", 0.2,
    )  # fmt: skip
    status, out, _ = call(capsys, "node", "init", "node", *decisions, "--json")
    first = json.loads(out.splitlines()[-1])
    assert status == 0
    assert first["held_out_ledger_id"] != first["ledger_id"]
    planned = ("node", "budget", "node", "--held-out", "--plan", "digits")
    status, _, err = call(capsys, *planned)
    assert (status, "must have [evaluation]" in err) == (2, True)
    status, out, _ = call(capsys, *planned, "--set", "evaluation.every=20")
    assert "would add 3 charges" in out
    assert "would be refused: policy.releases does not name metrics" in out
    config = tmp_path / "node" / "node.toml"
    config.write_text(config.read_text().replace("# metrics = 1.0", "metrics = 1.0"))
    status, out, _ = call(capsys, *planned, "--set", "evaluation.every=20", "--json")
    document = json.loads(out.splitlines()[-1])
    assert (document["planned"]["refused"], document["planned"]["forecast"]["fits"]) == (None, True)
    status, out, _ = call(capsys, "node", "rotate-key", "node", "--held-out", "--json")
    assert json.loads(out.splitlines()[-1])["public_key"] != first["held_out_public_key"]
    assert call(capsys, "node", "export", "node", "aside.jsonl", "--held-out")[0] == 0
    assert call(capsys, "audit", "ledger", "aside.jsonl", "--witness", "elsewhere/head.held-out")[0] == 0
    status, _, err = call(capsys, "node", "init", "other", *decisions[:-1], 1.0)
    assert (status, "held_out" in err) == (2, True)


def test_a_node_whose_data_are_nowhere_is_not_made(capsys, tmp_path):
    """Its budget would be fixed for good."""
    decisions = ("--declared-size", 1, "--epsilon", 8, "--delta", 1e-5, "--witness", tmp_path / "head")
    status, _, err = call(
        capsys, "node", "init", tmp_path / "n", "--dataset", "d", "--data", tmp_path / "no", *decisions
    )
    assert (status, "no such file or folder" in err) == (2, True)
    assert not (tmp_path / "n").exists()


@pytest.fixture
def init(capsys, tmp_path, monkeypatch):
    """Run ``node init`` for 1,400 units of two data sets, and ``node check`` without its server."""
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    for name in ("a", "b"):
        (tmp_path / f"{name}.csv").write_text("x,y\n1,0\n2,1\n" + name.replace("a", ""))

    def run(name="node", *, data="a.csv", epsilon=8, delta=1e-5, witness="head"):
        return call(
            capsys, "node", "init", name, "--dataset", name, "--data", data, "--declared-size", 1400,
            "--epsilon", epsilon, "--delta", delta, "--witness", f"elsewhere/{witness}", "--machine", "here",
        )  # fmt: skip

    return run


def checked(capsys, folder="node") -> dict[str, str]:
    status, out, _ = call(capsys, "node", "check", folder)
    assert status == 1  # there is no server
    return {line.split()[0]: line[13:] for line in out.splitlines()}


def test_a_delta_that_gives_units_away_is_refused_before_anything_is_made(init, tmp_path):
    status, _, err = init(delta=0.5)
    assert (status, "budget.delta is 0.5, must be below 1 / units, which is 0.000714 for 1400" in err) == (2, True)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.csv", "b.csv"]


def test_a_budget_that_protects_little_is_said_when_it_is_fixed_and_later(init, capsys, tmp_path):
    status, _, err = init(epsilon=50, delta=5e-4)
    assert (status, err.count("warning: delta 0.0005"), err.count("warning: epsilon 50")) == (0, 1, 1)
    found = checked(capsys)["delta"]
    assert found.startswith("ok: ")
    assert "delta 0.0005 is not well below" in found
    config = tmp_path / "node" / "node.toml"
    config.write_text(config.read_text().replace("declared_size = 1400", "declared_size = 14000"))
    assert checked(capsys)["delta"].startswith("NOT OK: budget.delta, which cannot be changed, is 0.0005")


def test_the_owner_sees_what_two_nodes_with_the_same_records_have_in_common(init, capsys, tmp_path):
    (tmp_path / "copy.csv").write_bytes((tmp_path / "a.csv").read_bytes())
    shown = []
    for name, data in (("node", "a.csv"), ("copied", "copy.csv"), ("other", "b.csv")):
        status, out, _ = init(name, data=data, witness=name)
        (line,) = [line for line in out.splitlines() if "fingerprint" in line]
        shown.append(line.split()[4].rstrip(";"))
        assert status == 0
        assert checked(capsys, name)["fingerprint"].startswith(f"ok: {shown[-1]}")
    assert (shown[0] == shown[1], shown[0] == shown[2], len(shown[0])) == (True, False, 32)


def test_data_that_are_said_to_lie_elsewhere_are_claimed_or_refused(init, capsys, tmp_path):
    assert init()[0] == 0
    assert init("other", data="b.csv", witness="other")[0] == 0
    config = tmp_path / "other" / "node.toml"
    text = config.read_text()
    config.write_text(text.replace("b.csv", "a.csv"))
    assert "where this ledger's data did not lie" in checked(capsys, "other")["ledger"]
    status, _, err = call(capsys, "node", "claim", "other")
    assert (status, len(err.splitlines()), "has a ledger already" in err) == (2, 1, True)
    (tmp_path / "c.csv").write_text("x,y\n5,0\n")
    config.write_text(text.replace("b.csv", "c.csv"))
    assert call(capsys, "node", "claim", "other")[0] == 0
    assert checked(capsys, "other")["ledger"].startswith("ok: ")


def test_a_scenario_whose_budget_protects_little_says_so(capsys):
    status, _, err = call(capsys, "plan", "digits", "--set", "privacy.delta=0.05")
    assert (status, "warning: delta 0.05 is not well below 1 / units" in err) == (0, True)
    assert "warning" not in call(capsys, "plan", "digits")[2]


def test_a_node_from_its_beginning(capsys, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data").mkdir()
    decisions = (
        "--dataset", "ward-7", "--data", "data", "--declared-size", 1400, "--epsilon", 8, "--delta", 1e-5,
        "--witness", "elsewhere/head", "--machine", "here",
    )  # fmt: skip
    status, out, _ = call(capsys, "node", "init", "node", *decisions, "--json")
    first = json.loads(out.splitlines()[-1])
    assert status == 0
    status, out, _ = call(capsys, "node", "budget", "node", "--plan", "digits", "--json")
    planned = json.loads(out.splitlines()[-1])["planned"]
    assert (planned["refused"], planned["forecast"]["fits"]) == (None, True)
    assert planned["forecast"]["epsilon_after"] == pytest.approx(8.0, abs=1e-3)
    config = tmp_path / "node" / "node.toml"
    config.write_text(config.read_text().replace("max_rounds = 10000", "max_rounds = 59"))
    status, out, _ = call(capsys, "node", "budget", "node", "--plan", "digits")
    assert "would be refused: rounds is 60, must be at most 59" in out
    status, out, _ = call(capsys, "node", "rotate-key", "node", "--json")
    assert json.loads(out.splitlines()[-1])["public_key"] != first["public_key"]
    assert call(capsys, "node", "export", "node", "ledger.jsonl")[0] == 0
    assert call(capsys, "audit", "ledger", "ledger.jsonl", "--witness", "elsewhere/head")[0] == 0
    assert json.loads(call(capsys, "node", "restore", "node", "--json")[1].splitlines()[-1])["proven"] is True
    assert json.loads(call(capsys, "node", "close", "node", "7", "--json")[1].splitlines()[-1])["closed"] == 0
    status, _, err = call(capsys, "node", "budget", "node", "--held-out")
    assert (status, "dataset.held_out is 0" in err) == (2, True)
    (tmp_path / "elsewhere" / "head").unlink()
    status, out, _ = call(capsys, "node", "restore", "node")
    assert (status, out.count("the rest of the budget counts as spent")) == (0, 1)
    for arguments, sentence in (
        (("node", "init", "second", *decisions), "ward-7 has a ledger already"),
        (("node", "init", "node", *decisions), "exists already"),
        (("node", "init", "third", *decisions, "--unit", "family"), "unit is 'family'"),
        (("node", "budget", "nowhere"), "cannot be read"),
        (("node", "budget", "elsewhere"), "node.toml: cannot be read"),
        (("node", "budget", "node", "--plot", "no/such/folder.svg"), "cannot be written"),
        (("node", "rotate-key", "elsewhere"), "node.toml: cannot be read"),
        (("node", "export", "node", "no/such/file"), "cannot be written"),
        (("audit", "run", "node"), "must be a run directory"),
        (("schema", "novel"), "must be one of audit-ledger"),
    ):
        status, _, err = call(capsys, *arguments)
        assert (status, len(err.splitlines())) == (2, 1), arguments
        assert sentence in err


def test_json_documents_match_their_published_schemas(run, capsys, tmp_path):
    folder, *_ = run
    ledger, export = folder / "ledgers" / "node-0001.db", tmp_path / "one.jsonl"
    call(capsys, "node", "export", ledger, export)
    genesis, entry, *_, head = export.read_text().splitlines()
    documents = {
        "audit-ledger": call(capsys, "audit", "ledger", ledger, "--json")[1].splitlines()[-1],
        "audit-run": call(capsys, "audit", "run", folder, "--json")[1].splitlines()[-1],
        "model": call(capsys, "model", "digits", "--json")[1].splitlines()[-1],
        "node-budget": call(capsys, "node", "budget", ledger, "--plan", "digits", "--json")[1].splitlines()[-1],
        "node-restore": '{"proven": true, "regained": 0, "charged": 0}',
        "ledger-genesis": genesis,
        "ledger-entry": entry,
        "ledger-head": head,
        "receipt": (folder / "receipts.jsonl").read_text().splitlines()[0],
    }
    names = call(capsys, "schema")[1].split()
    assert set(names) == documents.keys()
    for name, text in documents.items():
        published = json.loads((Path(__file__).parents[2] / "docs" / "schemas" / f"{name}.json").read_text())
        assert json.loads(call(capsys, "schema", name)[1]) == published, "run: conclave schema NAME > docs/schemas/…"
        jsonschema.Draft202012Validator(published).validate(json.loads(text))
        broken = json.loads(text)
        broken[next(iter(broken))] = {"no": "such thing"}
        with pytest.raises(jsonschema.ValidationError):
            jsonschema.Draft202012Validator(published).validate(broken)


def test_whatever_a_number_is_it_has_a_spelling_in_json(capsys):
    odd = {"a": [math.nan, (-math.inf, 1.5)], "b": {"c": math.inf, "d": None}}
    print_json(odd)
    assert json.loads(capsys.readouterr().out) == {"a": ["nan", ["-inf", 1.5]], "b": {"c": "inf", "d": None}}


def test_infinity_has_a_spelling_in_json(capsys, tmp_path):
    status, out, _ = call(capsys, "simulate", "digits-open", *FAST, "--out", tmp_path / "open", "--json")
    assert (status, json.loads(out.splitlines()[-1])["epsilon"]) == (0, "inf")
    schemas = Path(__file__).parents[2] / "docs" / "schemas"
    document = json.loads(call(capsys, "audit", "run", tmp_path / "open", "--json")[1].splitlines()[-1])
    assert document["epsilon"] == "inf"
    jsonschema.Draft202012Validator(json.loads((schemas / "audit-run.json").read_text())).validate(document)


@pytest.fixture
def node(capsys, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "home"))
    (tmp_path / "data").mkdir()
    status, _, err = call(
        capsys, "node", "init", tmp_path / "node", "--dataset", "ward-7", "--data", tmp_path / "data",
        "--declared-size", 1400, "--epsilon", 8, "--delta", 1e-5, "--witness", tmp_path / "head", "--machine", "here",
    )  # fmt: skip
    assert status == 0, err
    return tmp_path / "node"


OWNERS_COMMANDS = (
    ("budget",), ("export", "out"), ("rotate-key",), ("restore",), ("start",), ("check",), ("backup", "out"), ("unit",),
    ("approve",), ("pause",), ("resume",), ("close", "7"),
)  # fmt: skip


@pytest.mark.parametrize("command", OWNERS_COMMANDS, ids=lambda command: command[0])
def test_an_owners_command_of_another_user_is_one_sentence_and_writes_nothing(node, capsys, monkeypatch, command):
    before = sorted(node.rglob("*"))
    monkeypatch.chdir(node.parent)
    monkeypatch.setattr("os.geteuid", lambda: node.stat().st_uid + 1)
    status, _, err = call(capsys, "node", command[0], node, *command[1:])
    assert (status, len(err.splitlines())) == (2, 1)
    assert f"{node / 'state'}: belongs to user" in err
    assert sorted(node.rglob("*")) == before
    assert not (node.parent / "out").exists()


@pytest.mark.parametrize(
    ("error", "said", "ends_with"),
    [
        (PermissionError(13, "Permission denied", "/srv/ward-7/state"), "/srv/ward-7/state: Permission denied", 2),
        (OSError(28, "No space left on device"), "No space left on device", 3),
        (TimeoutError(), "TimeoutError", 3),
    ],
)
def test_what_the_system_refuses_is_one_sentence(node, capsys, monkeypatch, error, said, ends_with):
    def refuse(*arguments):
        raise error

    monkeypatch.setattr("conclave.clients.approvals.Approvals.pause", refuse)
    assert call(capsys, "node", "pause", node) == (ends_with, "", f"conclave: {said}\n")
    monkeypatch.setattr("conclave.deployment.node.process.start_node", refuse)
    assert call(capsys, "node", "start", node) == (3, "", f"conclave: {said}\n")  # systemd starts it again


def test_a_closed_pipe_ends_a_command_without_a_word():
    """In a process of its own: its end writes what is left in the pipe."""
    reader, writer = os.pipe()
    os.close(reader)
    done = subprocess.run(
        [sys.executable, "-m", "conclave", "--version"], stdout=writer, stderr=subprocess.PIPE, text=True, check=False
    )
    os.close(writer)
    assert (done.returncode, done.stderr) == (1, "")


@pytest.mark.parametrize("arguments", [("model", "wärd.toml", "--plot", "wärd.svg"), ("node", "check", "ä")])
def test_a_terminal_without_the_characters_is_shown_others(tmp_path, monkeypatch, arguments):
    """The ledger's name has characters that ASCII has not, and the model's picture too."""
    (tmp_path / "wärd.toml").write_bytes(b"\xef\xbb\xbf" + Path(find("digits")).read_bytes().replace(b"\n", b"\r\n"))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "40")
    out, err = (io.TextIOWrapper(io.BytesIO(), encoding="ascii", write_through=True) for _ in range(2))
    with redirect_stdout(out), redirect_stderr(err):
        status = status_of(*arguments)
    shown = out.buffer.getvalue().decode("ascii")
    assert "Traceback" not in err.buffer.getvalue().decode("ascii")
    assert status == (0 if "--plot" in arguments else 2)
    assert (r"w\xe4rd.svg" in shown) == ("--plot" in arguments)
    assert ("#" in shown) == ("--plot" in arguments)


def test_a_name_with_an_end_of_line_makes_no_second_line(capsys):
    assert call(capsys, "node", "check", "a\nb")[2].startswith(r"conclave: a\nb")


@pytest.mark.parametrize("command", ["rotate-key", "restore"])
def test_the_ledger_of_a_running_node_is_left_alone(node, capsys, command):
    """The node would go on to sign with the key it has in memory, and refuse everything until it is started again."""
    before = (node / "state" / "ledger.key").read_bytes(), (node.parent / "head").read_bytes()
    with alone(node / "state"):
        status, _, err = call(capsys, "node", command, node)
        assert (status, err) == (3, f"conclave: {node}: is running already, must be stopped first\n")
        assert before == ((node / "state" / "ledger.key").read_bytes(), (node.parent / "head").read_bytes())
    assert call(capsys, "node", command, node)[0] == 0


def test_a_server_with_a_host_that_is_none_is_not_begun(capsys, tmp_path):
    status, _, err = call(capsys, "server", "init", tmp_path / "fed", "--host", "bad host")
    assert (status, "must be a name like" in err) == (2, True)
    assert call(capsys, "server", "init", tmp_path / "fed", "--host", "fed.example.org")[0] == 0
