"""A server behind its proxy and three nodes as real processes on loopback: a whole run, and everything that is refused.

The data are heart disease by hospital where ``CONCLAVE_DATA`` is set, else a table that comes with scikit-learn, in
three formats. Needs nginx.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import signal
import ssl
import subprocess
import sys
import urllib.error
import urllib.request
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import pytest
from federation import FAR, NODES, Federation, free_port
from tunnel import Tunnel

from conclave.base.errors import BadInputError
from conclave.clients.folder.node_directory import NodeDirectory
from conclave.deployment.host.certificates import Authority
from conclave.deployment.operator import flower_control
from conclave.deployment.operator.flower_control import Control
from conclave.deployment.operator.profile import find_operator
from conclave.deployment.server.directory import ServerDirectory
from conclave.privacy.ledger.reading.history import LedgerFile
from conclave.privacy.ledger.reading.verification import audit_history


@pytest.fixture(scope="module")
def tunnel():
    with closing(Tunnel()) as made:
        yield made


@pytest.fixture(scope="module")
def federation(tmp_path_factory, tunnel):
    """A server that serves, three nodes that are connected, the third through a proxy, and a scenario."""
    made = Federation(tmp_path_factory.mktemp("deployment"))
    try:
        made.serve()
        for name in NODES:
            made.create_node(name, host=FAR if name == "third" else "localhost")
        for name in NODES:
            proxies = {"third": dict.fromkeys(("HTTPS_PROXY", "HTTP_PROXY", "ALL_PROXY"), tunnel.address)}
            made.connect(name, **proxies.get(name, {}))
        made.wait_for_nodes(NODES)
        yield made
    finally:
        made.end_all()


def plan_of(federation: Federation) -> str:
    return json.loads(federation.must("plan", "patients.toml", "--json").splitlines()[-1])["plan_hash"]


def test_a_whole_run_waits_for_its_owners_and_is_audited(federation):
    checked = federation.must("node", "check", "first", "--scenario", "patients.toml")
    assert "NOT OK" not in checked
    assert "1 bad rows are left out" in checked  # the last line of the CSV
    refused = federation.call("train", "patients.toml", "--superlink", "server/operator")
    assert (refused.returncode, "3 × awaiting-approval" in refused.stderr) == (3, True)
    for name in NODES:
        approved = federation.must("node", "approve", name, plan_of(federation)[:12])
        assert "releases delta, metrics of held-out units (1 times, from their own budget)" in approved
    done = federation.must("train", "patients.toml", "--superlink", "server/operator", "--json")
    assert "round 3 of 3: 3 of 3 replies, accuracy on held-out units" in done
    assert json.loads(done.splitlines()[-1])["status"] == "completed"
    run = federation.folder / "server" / "runs" / "patients-2"
    ledgers = [federation.folder / name / "state" / f"{side}.db" for name in NODES for side in ("ledger", "held-out")]
    audited = federation.must("audit", "run", run, *(part for path in ledgers for part in ("--ledger", path)), "--json")
    found = json.loads(audited.splitlines()[-1])
    assert (found["verdict"], found["receipts"], found["matched"], found["nodes"]) == ("NOT_REFUTED", 12, 12, 3)
    for path in ledgers:
        audit = audit_history(LedgerFile(path))
        assert (audit.findings, audit.mode, audit.seeded) == ([], "deployment", 0)
        assert audit.epsilon == pytest.approx(8.0, abs=0.01)
    assert federation.must("report", run)
    assert not list(run.glob("ledgers/*"))  # they stay with their owners


def test_a_proxy_on_the_way_out_sees_the_server_and_nothing_of_loopback(federation, tunnel, monkeypatch):
    """The third node took part through it. What its processes tell each other, with a secret, did not go that way."""
    assert set(tunnel.asked) == {f"{FAR}:{federation.port}"}
    checked = federation.call("node", "check", "third")
    assert "not reachable" in checked.stdout  # nobody but the proxy knows that name
    monkeypatch.setitem(federation.environment, "HTTPS_PROXY", tunnel.address)
    assert "NOT OK" not in federation.must("node", "check", "third")


def test_the_server_tells_its_monitoring_how_the_run_went(federation):
    assert federation.must("health", "server").split() == [
        "superlink:",
        "ok",
        "proxy:",
        "ok",
        "superlink-answers:",
        "ok",
    ]
    port = ServerDirectory(federation.folder / "server").config.monitoring.metrics_port
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=10) as answer:
        text = answer.read().decode()
    for line in (
        "conclave_server_rounds_total 3.0", 'conclave_server_replies_total{outcome="accepted"} 9.0',
        'conclave_server_nodes{state="online"} 3.0', 'conclave_program_up{program="proxy"} 1.0',
    ):  # fmt: skip
        assert line in text.splitlines()


def test_a_spent_budget_refuses_the_next_run(federation):
    """After the run above, whose approval is used up; each scenario would take the whole budget again."""
    unasked = federation.call("train", "patients.toml", "--superlink", "server/operator")
    assert (unasked.returncode, "3 × awaiting-approval" in unasked.stderr) == (3, True)
    for name in NODES:
        federation.must("node", "approve", name, plan_of(federation)[:12])
    again = federation.call("train", "patients.toml", "--superlink", "server/operator")
    assert (again.returncode, "3 × budget-exhausted" in again.stderr) == (3, True)
    for name in NODES:
        assert json.loads(federation.must("node", "budget", name, "--json").splitlines()[-1])["budget"]["spent"] <= 8.0


def test_a_paused_node_refuses_until_it_is_resumed(federation):
    for name in NODES:
        federation.must("node", "pause", name)
    paused = federation.call("train", "patients.toml", "--superlink", "server/operator")
    assert "3 × paused" in paused.stderr
    for name in NODES:
        federation.must("node", "resume", name)


@pytest.mark.parametrize(
    ("asked", "reason"),
    [
        ("privacy.epsilon=100", "noise is 0.208829, must be at least 0.3"),
        pytest.param("training.steps=10001", "steps is 10001", marks=pytest.mark.slow),
    ],
)
def test_what_no_policy_allows_is_refused_and_the_reason_stays_with_the_owner(federation, asked, reason):
    refused = federation.call("train", "patients.toml", "--set", asked, "--superlink", "server/operator")
    (sentence,) = refused.stderr.splitlines()
    assert refused.returncode == 3
    assert "no node admits the plan (3 × not-allowed)" in sentence
    for name in NODES:
        assert f"refused with not-allowed: {reason}" in federation.log(name)
    assert reason not in federation.log("server")


@pytest.mark.parametrize(
    ("version", "told"),
    [(b"9.", "was started with conclave/conclave 9."), (b"", "no node admits the plan (3 × not-allowed)")],
    ids=["another release", "this release"],
)
def test_changed_code_is_never_opened(federation, monkeypatch, version, told):
    """What travels as code is bytes to all: a bundle whose modules would leave a mark on import leaves none.

    That of another release is refused; one that says it is of this release is answered by what is installed.
    """
    mark = federation.folder / "imported"
    real = flower_control.build_fab_from_files

    def poisoned(files):
        code = f"open({str(mark)!r}, 'w').close()\n".encode()
        project = files["pyproject.toml"].replace(b'version = "', b'version = "' + version, 1)
        return real(
            {
                "pyproject.toml": project,
                "installed.py": code,
                "conclave/__init__.py": code,
                "conclave/clients/app.py": code,
            }
        )

    monkeypatch.setattr(flower_control, "build_fab_from_files", poisoned)
    with Control.of(find_operator(str(federation.folder / "server" / "operator"))) as control:
        scenario = (federation.folder / "patients.toml").read_text().replace("epsilon = 8.0", "epsilon = 100.0")
        run_id = control.start({"scenario": scenario})
        list(control.said(run_id))
        federation.wait_for("its end", lambda: control.runs(run_id)[0].finished)
        assert told in control.runs(run_id)[0].details
    assert not mark.exists()


def request(federation: Federation, path: str, context: ssl.SSLContext, host: str = "localhost") -> int:
    try:
        with urllib.request.urlopen(
            urllib.request.Request(f"https://{host}:{federation.port}{path}", data=b"", method="POST"),
            context=context, timeout=10,
        ) as answer:  # fmt: skip
            return int(answer.status)
    except urllib.error.HTTPError as error:
        with error:
            return error.code


@pytest.mark.parametrize(
    ("path", "status"),
    [
        ("/v1/control/start-run", 403),
        ("/v1/control/register-node", 403),
        ("/v1//control/start-run", 403),
        ("/v1/fleet/../control/start-run", 403),
        ("/v1/fleet/%2e%2e/control/start-run", 403),
        ("/v1/runtime/acquire-task", 404),
        ("/v1/fleet/../runtime/acquire-task", 404),
        ("/v1/fleet/..%2fruntime/acquire-task", 404),
        ("/docs", 404),
        ("/", 404),
    ],
)
def test_without_an_operators_certificate_only_the_fleet_is_there(federation, path, status):
    context = ssl.create_default_context(cafile=federation.folder / "server" / "operator" / "ca.pem")
    assert request(federation, path, context) == status


def test_the_fleet_needs_an_enrolled_key(federation):
    """An unsigned request, and a node with a key that nobody enrolled."""
    context = ssl.create_default_context(cafile=federation.folder / "server" / "operator" / "ca.pem")
    assert request(federation, "/v1/fleet/activate-node", context) == 415  # not even a message
    before = federation.status()["nodes"]
    stranger = federation.folder / "stranger"
    shutil.copytree(federation.folder / "second", stranger)
    (stranger / "state" / "node.key").unlink()
    from conclave.clients.folder.node_key import create_node_key

    create_node_key(stranger / "state" / "node.key")
    directory = NodeDirectory(stranger)
    command = [
        str(Path(sys.executable).with_name("flower-supernode")), "--superlink", f"localhost:{federation.port}",
        "--root-certificates", str(directory.connection_files()[1]), "--auth-supernode-private-key",
        str(directory.node_key), "--isolation", "process", "--port", str(free_port()), "--max-retries", "0",
    ]  # fmt: skip
    done = subprocess.run(command, env=federation.environment, capture_output=True, text=True, timeout=90, check=False)
    assert done.returncode != 0
    assert federation.status()["nodes"] == before


def test_a_revoked_operator_and_a_renewed_certificate_count_at_once(federation):
    federation.must("server", "operator", "server", "ann", "ann")
    assert federation.call("status", "--superlink", "ann").returncode == 0
    assert "refused, now" in federation.must("server", "revoke", "server", "ann")
    federation.wait_for("revocation", lambda: federation.call("status", "--superlink", "ann").returncode == 2)
    refused = federation.call("status", "--superlink", "ann").stderr
    assert "the operator's certificate was not accepted" in refused
    before = served(federation)
    assert "in use" in federation.must("server", "renew", "server", "--days", 40)
    federation.wait_for("another certificate", lambda: served(federation) != before)
    federation.status()  # the other operator, and the nodes, go on
    assert list(federation.status()["nodes"].values()) == ["online"] * 3


def served(federation: Federation) -> str:
    return ssl.get_server_certificate(("localhost", federation.port))


def test_another_authoritys_operator_is_refused(federation, tmp_path):
    (tmp_path / "tls").mkdir()
    authority = Authority.create(tmp_path / "tls", days=10)
    authority.issue_operator(tmp_path / "operator", "impostor", days=10)
    real = find_operator(str(federation.folder / "server" / "operator"))
    impostor = replace(real, certificate=tmp_path / "operator.pem", key=tmp_path / "operator.key")
    with Control.of(impostor) as control, pytest.raises(BadInputError, match="cannot list nodes"):
        control.nodes()


def test_a_server_with_another_certificate_is_not_spoken_to(federation, tmp_path):
    Authority.create(tmp_path, days=10)
    real = find_operator(str(federation.folder / "server" / "operator"))
    with (
        Control.of(replace(real, ca=tmp_path / "ca.pem")) as control,
        pytest.raises(BadInputError, match="certificate is not accepted"),
    ):
        control.nodes()


def test_plain_http_is_refused(federation):
    with pytest.raises(urllib.error.HTTPError) as caught:
        urllib.request.urlopen(f"http://localhost:{federation.port}/v1/fleet/activate-node", timeout=10)
    with caught.value as refused:
        assert refused.code == 400


def test_the_runtime_api_listens_on_loopback_only(federation):
    """Every listening socket of the federation but the proxy's is bound to 127.0.0.1."""
    server = ServerDirectory(federation.folder / "server")
    inner = [server.config.internal_port]
    inner += [NodeDirectory(federation.folder / name).config.server.internal_port for name in NODES]
    listening: dict[int, set[str]] = {}
    for table in ("/proc/net/tcp", "/proc/net/tcp6"):
        for line in Path(table).read_text().splitlines()[1:]:
            local, state = line.split()[1], line.split()[3]
            if state == "0A":
                address, port = local.split(":")
                listening.setdefault(int(port, 16), set()).add(address)
    assert {port: listening[port] for port in inner} == {port: {"0100007F"} for port in inner}


def sockets_of(pid: int) -> set[tuple[str, int]]:
    """The other ends of a process's TCP connections: address as the kernel spells it, and port."""
    links = [link.readlink() for link in Path(f"/proc/{pid}/fd").iterdir() if link.is_symlink()]
    inodes = {str(link)[8:-1] for link in links if str(link).startswith("socket:[")}
    found = set()
    for table in ("/proc/net/tcp", "/proc/net/tcp6"):
        for line in Path(table).read_text().splitlines()[1:]:
            fields = line.split()
            if fields[9] in inodes and fields[3] != "0A":
                address, port = fields[2].split(":")
                found.add((address, int(port, 16)))
    return found


def children_of(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def test_a_node_speaks_with_the_server_only_and_writes_into_its_state_only(federation):
    """Rule 14 of docs/privacy.md, on the running processes after whole runs; reading of data has tests of its own."""
    for name in NODES:
        server = NodeDirectory(federation.folder / name).config.server
        executor = federation.running[name].pid
        (supernode,) = children_of(executor)
        loopback = {("0100007F", server.internal_port)}
        federation.wait_for("its own connection", lambda executor=executor, ends=loopback: sockets_of(executor) == ends)
        inward = {end for end in sockets_of(supernode) if end[1] != federation.port}
        assert all(address == "0100007F" for address, _ in inward)  # the executor's end of the same connections
        inside = {path.relative_to(federation.folder / name).parts[0] for path in (federation.folder / name).rglob("*")}
        assert inside == {"node.toml", "state"}
    for path in federation.watched.values():
        assert list(path.rglob("*")) == []  # neither nodes nor server wrote to home, cache or temporary files
    data = [path for path in (federation.folder / "data").rglob("*") if path.is_file()]
    assert len(data) == 3  # nothing beside the private files either


def test_secrets_are_their_owners_alone(federation):
    for pattern in ("**/*.key", "**/*.db", "**/executor.secret"):
        found = list(federation.folder.glob(pattern))
        assert found
        assert not [path for path in found if path.stat().st_mode & 0o077 and path.name != "flower.db"]


def test_a_node_that_is_killed_comes_back(federation):
    """Its ledger is as it was, and it is connected again."""
    path = federation.folder / "second" / "state" / "ledger.db"
    before = hashlib.sha256(b"".join(LedgerFile(path).lines())).hexdigest()
    os.killpg(federation.running["second"].pid, signal.SIGKILL)
    federation.running.pop("second").wait(30)
    federation.start("second", "node", "start", "second")
    federation.wait_for("the node", lambda: federation.log("second").count("dials") == 2)
    federation.wait_for("three nodes", lambda: list(federation.status()["nodes"].values()) == ["online"] * 3)
    assert hashlib.sha256(b"".join(LedgerFile(path).lines())).hexdigest() == before


def test_everything_ends_in_order(federation):
    assert federation.end("third") == 0
    assert "Traceback" not in federation.log("third")
