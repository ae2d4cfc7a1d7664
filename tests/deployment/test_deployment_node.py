"""A node's folder made ready to run: what its check finds, and that nothing else is done than what was asked for."""

from __future__ import annotations

import json
import shutil
import ssl
import subprocess
import sys
from datetime import datetime, timedelta
from pathlib import Path
from types import SimpleNamespace

import httpx
import numpy as np
import pytest
from flwr.app import Context, Message, RecordDict
from flwr.common.constant import SUPERLINK_NODE_ID
from flwr.supercore.task_identity import TaskIdentity

from conclave.base.errors import BadInputError, UnavailableError
from conclave.clients.app import make_client_app
from conclave.clients.approvals import Approvals
from conclave.clients.folder.node_directory import NodeDirectory, create_node
from conclave.clients.folder.node_key import create_node_key
from conclave.deployment.flower import runtime as flower_runtime
from conclave.deployment.flower.grid import QuickGrid
from conclave.deployment.flower.runtime import RuntimeApi, check_flower, heartbeat_of
from conclave.deployment.host.certificates import Authority
from conclave.deployment.node import check as node_check
from conclave.deployment.node import loading as node_loading
from conclave.deployment.node.check import check_node
from conclave.deployment.node.loading import open_node
from conclave.deployment.node.process import _refusal
from conclave.deployment.operator.flower_control import Control, bundle
from conclave.protocol.codec import decode
from conclave.protocol.messages import QUERY_DESCRIBE, Description, ProtocolError
from conclave.server.scenario import parse_scenario
from conclave.simulations.estimate import estimate_simulated
from conclave.simulations.simulate import simulate

SCENARIO = """name = "rows"
[model]
width = 8
encoder = { kind = "table", features = 4 }
head = { kind = "classification", classes = 2 }
[model.experts]
routed = 2
hidden = 8
top_k = 1
[data]
source = "nodes"
[partition]
scheme = "iid"
nodes = 3
[privacy]
epsilon = 4.0
delta = 1e-5
clip = 1.0
sampling_rate = 0.5
[training]
learning_rate = 0.5
[federation]
rounds = 5
experts_per_node = 2
"""


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A node whose data are an npz file of 60 rows."""
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "home"))
    generator = np.random.default_rng(0)
    rows = {"x": generator.normal(size=(60, 4)).astype(np.float32), "y": generator.integers(2, size=60)}
    np.savez(tmp_path / "rows.npz", **rows)
    create_node(
        tmp_path / "node",
        dataset={"id": "rows", "data": str(tmp_path / "rows.npz"), "declared_size": 60, "held_out": 0.25},
        budget={"epsilon": 4.0, "delta": 1e-5},
        storage={"witness": str(tmp_path / "witness"), "machine": "m"},
    )
    edit(tmp_path / "node", "# [format]", '[format]\nkind = "npz"\ntable = "x"\nlabel = "y"\nclasses = 2\n#')
    return tmp_path / "node"


def edit(folder, old: str, new: str) -> None:
    path = folder / "node.toml"
    assert old in path.read_text()
    path.write_text(path.read_text().replace(old, new, 1))


def scenario(**changes):
    return parse_scenario(SCENARIO, where="test", overrides=changes)


def problems(folder, asked=None) -> dict[str, str]:
    return {check.what: check.problem for check in check_node(NodeDirectory(folder), asked) if check.problem}


def test_a_node_in_order_lacks_a_server_only(folder):
    before = (folder / "state" / "ledger.db").read_bytes()
    assert problems(folder, scenario()).keys() == {"server"}
    assert (folder / "state" / "ledger.db").read_bytes() == before


def test_data_that_are_exchanged_while_they_are_read_are_refused(folder, tmp_path, monkeypatch):
    """What the claims are on is what was trained on."""
    (tmp_path / "rows.npz").rename(tmp_path / "true.npz")
    shutil.copy(tmp_path / "true.npz", tmp_path / "others.npz")
    (tmp_path / "rows.npz").symlink_to("others.npz")
    NodeDirectory(folder).claim_data()
    read = node_loading.read_data

    def exchanging(directory):
        data = read(directory)
        (tmp_path / "rows.npz").unlink()
        (tmp_path / "true.npz").rename(tmp_path / "rows.npz")
        return data

    monkeypatch.setattr(node_loading, "read_data", exchanging)
    with pytest.raises(UnavailableError, match="while it was read"):
        node_loading.open_node(NodeDirectory(folder))


def test_a_node_whose_budget_protects_little_says_so_at_every_start(folder, caplog):
    node_loading.open_node(NodeDirectory(folder))
    assert "well below" not in caplog.text
    edit(folder, "declared_size = 60", "declared_size = 100000")
    node_loading.open_node(NodeDirectory(folder))
    assert "delta 1e-05 is not well below 1 / units" in caplog.text


def test_files_that_come_while_they_are_read_are_refused(folder, tmp_path, monkeypatch):
    (tmp_path / "many").mkdir()
    (tmp_path / "rows.npz").rename(tmp_path / "many" / "rows.npz")
    monkeypatch.setattr(NodeDirectory, "data", tmp_path / "many")
    NodeDirectory(folder).claim_data()

    def read(directory):
        (tmp_path / "many" / "more.npz").write_bytes(b"more")
        return directory

    monkeypatch.setattr(node_loading, "read_data", read)
    with pytest.raises(UnavailableError, match="other files lay there while it was read"):
        node_loading.open_node(NodeDirectory(folder))


@pytest.mark.parametrize(
    ("old", "new", "what", "sentence"),
    [
        ('table = "x"', 'table = "z"', "data", "z"),
        ("[format]\n", "# [format]\n# ", "data", ""),
        ("max_rounds = 10000", "max_rounds = 3", "budget", "rounds is 5, must be at most 3"),
        ("min_noise_multiplier = 0.3", "min_noise_multiplier = 50.0", "budget", "must be at least 50"),
        ("epsilon = 4.0", "epsilon = 8.0", "ledger", "must be 4"),
    ],
)
def test_what_is_not_in_order_says_what_to_do(folder, old, new, what, sentence):
    if new.startswith("# [format]"):
        text = (folder / "node.toml").read_text()
        (folder / "node.toml").write_text(text[: text.index("[format]")] + text[text.index("# The server to dial") :])
        sentence = "must say how the data are laid out"
    else:
        edit(folder, old, new)
    assert sentence in problems(folder, scenario())[what]


def test_its_owner_is_shown_how_many_groups_there_are(folder):
    """One person whom two spellings made two shows in the number."""
    stored = np.load(folder.parent / "rows.npz")
    patients = np.array(["12", "12.0", *map(str, range(20, 39))])[np.minimum(np.arange(60), 20)]
    np.savez(folder.parent / "rows.npz", **stored, who=patients)
    edit(folder, 'label = "y"', 'label = "y"\ngroup_by = "who"')
    (found,) = (check.found for check in check_node(NodeDirectory(folder), None) if check.what == "data")
    assert found == "60 records in 20 groups, the largest of 40"


def test_data_of_another_shape_are_named(folder):
    found = problems(folder, scenario(**{"model.encoder.features": 7}))
    assert "features" in found["data"]


def test_what_evaluation_would_cost_is_looked_at_on_its_own_side(folder):
    asked = scenario(**{"evaluation": {"every": 1, "held_out": 0.25}})
    found = {check.what: check for check in check_node(NodeDirectory(folder), asked)}["evaluation"]
    assert (found.problem, found.found) == (
        None,
        "none here, for policy.releases does not name metrics; the node trains",
    )
    edit(folder, "# metrics = 1.0", "metrics = 1.0")
    found = {check.what: check for check in check_node(NodeDirectory(folder), asked)}["evaluation"]
    assert found.problem is None
    assert "100.0% of the budget" in found.found
    costly = scenario(**{"evaluation": {"every": 1, "held_out": 0.25, "epsilon": 6.0}})
    assert "more than is left" in problems(folder, costly)["evaluation"]


def test_a_spent_budget_is_named(folder):
    asked = scenario(**{"privacy.epsilon": 5.0})
    assert "more than is left" in problems(folder, asked)["budget"]


def test_what_its_owner_lets_it_do_is_looked_at(folder):
    def owner():
        return {check.what: check for check in check_node(NodeDirectory(folder), None)}["owner"]

    assert owner().found == "works at any time"
    now = datetime.now()
    hours = [f"{(now + timedelta(hours=h)):%H:%M}-{(now + timedelta(hours=h + 2)):%H:%M}" for h in (-1, 5)]
    edit(folder, "# hours", f'hours = "{hours[0]}"\n# hours')
    assert owner().found == f"works {hours[0]}, which is now"
    edit(folder, hours[0], hours[1])
    assert owner().found == f"works {hours[1]}, which is not now"
    approvals = Approvals(NodeDirectory(folder).plans)
    with pytest.raises(ProtocolError, match="not approved"):
        approvals.check(scenario().plan(), "rows", needed=True)
    assert owner().found.endswith("; plans that wait for conclave node approve: 1")
    approvals.pause()
    assert "conclave node resume" in owner().problem


def test_a_full_disk_is_named(folder, monkeypatch):
    monkeypatch.setattr(node_check.shutil, "disk_usage", lambda _: SimpleNamespace(free=2**20))
    assert "1 MiB free" in problems(folder)["disk"]


def test_a_server_that_is_not_there_and_a_key_that_others_can_read_are_named(folder, tmp_path):
    from conclave.deployment.host.certificates import Authority

    Authority.create(tmp_path, days=3)
    text = (folder / "node.toml").read_text()
    (folder / "node.toml").write_text(f'{text}\n[server]\naddress = "localhost:1"\nca = "{tmp_path / "ca.pem"}"\n')
    (folder / "state" / "node.key").chmod(0o644)
    found = problems(folder)
    assert "others can read it" in found["node key"]
    assert "not reachable" in found["server"]
    assert "good for 3 more days" in found["certificate"]


def test_an_opened_node_trains_on_one_side_and_measures_on_the_other(folder):
    node = open_node(NodeDirectory(folder))
    assert len(node.records["label"]) + len(node.held_out.records["label"]) == 60
    assert 0 < len(node.held_out.records["label"]) < 40
    assert node.declared_size == 45
    assert node.describe().held_out is None  # the policy does not name metrics
    first, second = node.new_secret("a"), node.new_secret("a")
    assert first != second  # from the operating system, not from the charge
    assert node.approvals is not None


def test_a_process_stands_for_one_node(folder):
    """Whatever a message's context says: its partition, its run and its scenario lead nowhere else."""
    TaskIdentity.run_id, TaskIdentity.node_id, TaskIdentity.task_id = 1, SUPERLINK_NODE_ID, 0
    node = open_node(NodeDirectory(folder))
    context = Context(1, 2, {"partition-id": 3, "num-partitions": 9}, RecordDict(), {"scenario": "", "run-dir": "."})
    request = Message(RecordDict(), dst_node_id=2, message_type=QUERY_DESCRIBE, group_id="1")
    answer = make_client_app(lambda _: node)(request, context)
    assert decode(answer.content, Description) == node.describe()


def test_another_flower_is_refused(monkeypatch):
    monkeypatch.setattr(flower_runtime, "version", lambda name: "1.42.0")
    with pytest.raises(BadInputError, match=r"flwr 1\.42\.0 is installed, must be 1\.41\.0"):
        check_flower()


@pytest.mark.parametrize(
    ("answer", "arrived"),
    [
        (SimpleNamespace(success=True), True),
        (SimpleNamespace(success=False), True),  # Flower's own would send this process SIGINT
        (httpx.ConnectError("down"), False),
        (httpx.HTTPStatusError("over", request=None, response=httpx.Response(401)), True),
    ],
)
def test_a_task_that_is_over_ends_no_server_and_no_node(answer, arrived):
    def send(_):
        if isinstance(answer, Exception):
            raise answer
        return answer

    assert heartbeat_of(SimpleNamespace(SendTaskHeartbeat=send))() is arrived


def test_what_flower_answers_for_a_node_that_is_gone_is_no_reply_and_is_not_waited_for(monkeypatch):
    grid = QuickGrid(RuntimeApi("localhost:1", b""), "token")
    answers = {"a": 7, "b": SUPERLINK_NODE_ID}  # message → who answered
    monkeypatch.setattr(grid, "push_messages", lambda messages: list(answers))
    made = [
        SimpleNamespace(metadata=SimpleNamespace(src_node_id=node, reply_to_message_id=asked))
        for asked, node in answers.items()
    ]
    monkeypatch.setattr(grid, "pull_messages", lambda waiting: made)
    assert grid.send_and_receive([], timeout=None) == made[:1]
    grid.close()


def test_a_bundle_holds_no_code():
    import io
    import zipfile

    with zipfile.ZipFile(io.BytesIO(bundle("0.1.0"))) as archive:
        assert sorted(archive.namelist()) == [".info/CONTENT", "pyproject.toml"]
    assert bundle("0.1.0") == bundle("0.1.0")


def test_only_this_version_is_answered():
    version = flower_runtime.installed_version()
    assert _refusal("conclave/conclave", version) is None
    for name, number in (("conclave/conclave", "9.9.9"), ("other/conclave", version)):
        document = _refusal(name, number)["document"]["json"]
        assert json.loads(document)["code"] == "version-mismatch"


def test_a_scenario_for_real_nodes_is_planned_but_not_simulated(tmp_path):
    asked = scenario()
    assert estimate_simulated(asked).rounds == 5
    from conclave.server.run_directory import RunDirectory

    with pytest.raises(BadInputError, match="conclave train runs such a scenario"):
        simulate(asked, RunDirectory.create(asked, tmp_path / "run"))


def test_a_node_loads_nothing_that_it_does_not_need():
    """What is not imported opens no connection and writes no cache; these do, or once did."""
    names = {"datasets", "flwr_datasets", "matplotlib", "sklearn", "huggingface_hub", "ray", "conclave.simulations"}
    code = f"import sys, conclave.deployment.node.process; print(sorted({names} & set(sys.modules)))"
    root = Path(__file__).resolve().parents[2]
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=root, capture_output=True, text=True, timeout=120, check=True
    )
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize("wrong", ["private", "certificate", "missing"])
def test_only_a_nodes_public_key_is_enrolled(tmp_path, wrong):
    """The private half lies beside it, and a certificate looks like it; nothing of either is sent."""
    path = tmp_path / "node.key"
    if wrong == "private":
        create_node_key(path)
    elif wrong == "certificate":
        Authority.create(tmp_path, days=3)
        (tmp_path / "ca.pem").rename(path)
    with (
        Control("localhost:1", ssl.create_default_context()) as control,
        pytest.raises(BadInputError, match=r"must be a node's public key"),
    ):
        control.register(path)


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16"])
def test_a_public_key_may_have_been_saved_with_a_mark_but_in_no_other_encoding(tmp_path, encoding):
    public = create_node_key(tmp_path / "node.key")
    public.write_text(public.read_text().replace("\n", "\r\n"), encoding=encoding)
    error, said = (BadInputError, "must be a node's public key")
    if encoding != "utf-16":
        error, said = (UnavailableError, "cannot register the node: not reachable")
    with Control("localhost:1", ssl.create_default_context()) as control, pytest.raises(error, match=said):
        control.register(public)
