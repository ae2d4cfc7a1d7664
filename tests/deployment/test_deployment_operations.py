"""How a node or a server runs on its machine: logs, limits, health, metrics, units."""

from __future__ import annotations

import json
import logging
import os
import shutil
import socket
import subprocess
import sys
import threading
import urllib.error
import urllib.request
from collections import Counter

import pytest
from flwr.app import Message, RecordDict
from flwr.common.constant import SUPERLINK_NODE_ID
from flwr.supercore.task_identity import TaskIdentity
from prometheus_client.parser import text_string_to_metric_families
from test_deployment_node import edit, folder  # noqa: F401  (a fixture)

from conclave.base.errors import BadInputError, UnavailableError
from conclave.clients.folder.node_directory import NodeDirectory
from conclave.deployment import service_unit
from conclave.deployment.health import ask_health
from conclave.deployment.host import environment
from conclave.deployment.host.logs import JsonLines, RotatingLog
from conclave.deployment.host.monitoring import HOST, monitoring
from conclave.deployment.node.loading import open_node
from conclave.deployment.node.metrics import NodeMetrics
from conclave.deployment.server import process as server_process
from conclave.deployment.server.directory import ServerDirectory
from conclave.protocol.codec import encode
from conclave.protocol.messages import Closed, Refusal
from conclave.simulations.shipped import find


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind((HOST, 0))
        return int(probe.getsockname()[1])


def get(port: int, path: str) -> tuple[int, str]:
    try:
        with urllib.request.urlopen(f"http://{HOST}:{port}{path}", timeout=10) as answer:
            return answer.status, answer.read().decode()
    except urllib.error.HTTPError as error:
        with error:
            return error.code, error.read().decode()


def test_a_line_of_json_says_when_where_and_what():
    try:
        raise ValueError('told "no"')
    except ValueError:
        record = logging.LogRecord("conclave.node", logging.ERROR, "f", 1, "task %d\nfailed", (7,), sys.exc_info())
    line = JsonLines().format(record)
    assert "\n" not in line
    event = json.loads(line)
    assert (event["level"], event["logger"], event["message"]) == ("ERROR", "conclave.node", "task 7\nfailed")
    assert event["time"].endswith("+00:00")
    assert 'ValueError: told "no"' in event["exception"]


def test_logs_are_bounded_and_for_their_owner_alone(tmp_path, monkeypatch):
    monkeypatch.setattr("conclave.deployment.host.logs._FILE_BYTES", 1000)
    path = tmp_path / "supernode.log"
    log = RotatingLog(path)
    for number in range(500):
        log.write(f"line {number:03d} %s {{}}")
    log.close()
    files = sorted(tmp_path.iterdir())
    assert [file.name for file in files] == ["supernode.log", *(f"supernode.log.{n}" for n in (1, 2, 3, 4))]
    assert all(file.stat().st_size <= 1000 and file.stat().st_mode & 0o077 == 0 for file in files)
    assert path.read_text().splitlines()[-1] == "line 499 %s {}"


def test_a_full_disk_loses_lines_of_the_log_and_nothing_else(tmp_path, capsys):
    log = RotatingLog(tmp_path / "log")
    log.stream = open("/dev/full", "w")  # noqa: PTH123, SIM115
    log.write("lost")
    log.close()
    assert capsys.readouterr() == ("", "")


def test_memory_beyond_the_limit_is_refused_to_the_process():
    """In a process of its own: a limit cannot be taken back."""
    code = (
        "import torch\nfrom conclave.clients.operations_config import LimitsConfig\n"
        "from conclave.deployment.node.limits import keep_to\n"
        "keep_to(LimitsConfig(threads=3, memory_mb=1024))\nprint(torch.get_num_threads())\n"
        "torch.ones(50 * 2**20 // 4)\n"
        "try:\n    torch.ones(1100 * 2**20 // 4)\nexcept RuntimeError as error:\n    print('memory' in str(error))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False)
    assert done.stdout.split() == ["3", "True"], done.stderr


def test_a_limit_beyond_what_the_process_may_have_is_one_sentence():
    """As nobody: root may raise any limit. Everything is loaded before, for nobody may read less."""
    code = (
        "import os, resource\nfrom conclave.clients.operations_config import LimitsConfig\n"
        "from conclave.deployment.node.limits import keep_to\nfrom conclave.base.errors import BadInputError\n"
        "resource.setrlimit(resource.RLIMIT_DATA, (2**31, 2**31))\n"
        "if os.getuid() == 0: os.setuid(65534)\n"
        "try:\n    keep_to(LimitsConfig(memory_mb=4096))\nexcept BadInputError as error:\n    print(error)\n"
        "keep_to(LimitsConfig(memory_mb=2048))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("limits.memory_mb is 4096, must be at most the 2048 that this process may have")


def test_a_proxy_for_the_way_out_never_sees_loopback(monkeypatch):
    for name in ("NO_PROXY", "no_proxy"):
        monkeypatch.setenv(name, "intra.example.org")
    for name in ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY"):
        monkeypatch.setenv(name, "http://proxy.example.org:3128")
    environment.reach_loopback_directly()
    environment.reach_loopback_directly()
    assert os.environ["NO_PROXY"] == "intra.example.org,localhost,127.0.0.1,::1"
    import httpx

    with httpx.Client() as client:  # as Flower makes them
        for url, direct in (("http://127.0.0.1:9094", True), ("https://localhost:1", True), ("https://fed:1", False)):
            used = client._transport_for_url(httpx.URL(url))
            assert (used is client._transport) is direct, url


def test_health_is_well_or_not(folder):  # noqa: F811
    state, port = {"supernode": True}, free_port()
    with pytest.raises(BadInputError, match=r"no monitoring\.metrics_port"):
        ask_health(folder)
    edit(folder, "# metrics_port = 9464", f"metrics_port = {port}")
    with monitoring(port, _nothing(), lambda: state):
        assert get(port, "/health") == (200, '{"supernode": true}\n')
        assert ask_health(folder) == {"supernode": True}
        state["supernode"] = False
        assert get(port, "/health")[0] == 503
        assert ask_health(folder) == {"supernode": False}
        assert get(port, "/")[0] == 404
        with pytest.raises(BadInputError, match="cannot be used"), monitoring(port, _nothing(), lambda: state):
            pass
        addresses = {line.split()[1] for line in _listening() if line.split()[1].endswith(f":{port:04X}")}
        assert addresses == {f"0100007F:{port:04X}"}  # loopback, and no other address
    with pytest.raises(UnavailableError, match="nobody answers"):
        ask_health(folder)
    with pytest.raises(BadInputError, match="neither"):
        ask_health(folder.parent)


@pytest.mark.parametrize(
    "said",
    [
        b"SSH-2.0-OpenSSH_9.2\r\n",
        b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\n{",
        b"HTTP/1.1 200 OK\r\n\r\n" + b"[" * 60_000,
    ],
    ids=["another-protocol", "cut-short", "nested"],
)
def test_another_program_on_the_port_is_named(folder, said):  # noqa: F811
    with socket.create_server((HOST, 0)) as other:
        edit(folder, "# metrics_port = 9464", f"metrics_port = {other.getsockname()[1]}")
        answering = threading.Thread(target=_answer_once, args=(other, said))
        answering.start()
        with pytest.raises(UnavailableError, match="another program answers on port"):
            ask_health(folder)
        answering.join()


def _answer_once(server: socket.socket, said: bytes) -> None:
    connection, _ = server.accept()
    with connection:
        connection.recv(1 << 16)
        connection.sendall(said)


def _listening() -> list[str]:
    with open("/proc/net/tcp") as table:  # noqa: PTH123
        return [line for line in table.read().splitlines()[1:] if line.split()[3] == "0A"]


class _nothing:  # noqa: N801
    def collect(self):
        return ()


NODE_METRICS = {
    "conclave_info", "conclave_program_up", "conclave_certificate_days", "conclave_disk_free_bytes",
    "conclave_node_answers", "conclave_epsilon_spent", "conclave_epsilon_budget", "conclave_node_paused",
    "conclave_node_in_hours", "conclave_node_plans_waiting",
}  # fmt: skip


def test_a_node_tells_its_monitoring_what_the_server_knows_too(folder):  # noqa: F811
    """The allow-list of its metrics: another one fails here, and has to be thought about."""
    node, port = open_node(NodeDirectory(folder)), free_port()
    metrics = NodeMetrics(node, lambda: {"supernode": True}, folder / "no-ca.pem", folder / "state")
    TaskIdentity.run_id, TaskIdentity.node_id, TaskIdentity.task_id = 1, SUPERLINK_NODE_ID, 0
    asked = Message(RecordDict(), dst_node_id=1, message_type="train", group_id="1")
    for content in (encode(Closed(run_id="1")), encode(Closed(run_id="2")), encode(Refusal(code="paused"))):
        metrics.count(asked, Message(content, reply_to=asked))
    node.approvals.pause()
    with monitoring(port, metrics, lambda: {}):
        status, text = get(port, "/metrics")
    assert status == 200
    found = {family.name: family.samples for family in text_string_to_metric_families(text)}
    assert found.keys() == NODE_METRICS
    values = {
        (s.name, *(s.labels[k] for k in sorted(s.labels))): s.value for samples in found.values() for s in samples
    }
    assert values["conclave_node_answers_total", "answered", "train"] == 2
    assert values["conclave_node_answers_total", "paused", "train"] == 1
    assert values["conclave_epsilon_spent", "training"] == 0.0
    assert values["conclave_epsilon_budget", "held-out"] == 4.0
    assert values[("conclave_node_paused",)] == 1.0


def test_a_run_on_a_server_says_that_its_nodes_are_deployed(tmp_path):
    """Audits compare its ledgers with that; going on with it does not change it."""
    server = ServerDirectory.create(tmp_path / "fed", ["localhost"], port=443, days=30)
    run, number = server_process._directory(server, {"scenario": find("digits").read_text()}, "5")
    assert (run.mode, number) == ("deployment", "5")
    again, number = server_process._directory(server, {"resume": run.path.name}, "6")
    assert (again.path, again.mode, number) == (run.path, "deployment", "5")


def units(tmp_path, folder):  # noqa: F811
    edit(folder, "# threads = 4", "threads = 2")
    edit(folder, "# memory_mb = 8192", "memory_mb = 3000")
    server = ServerDirectory.create(tmp_path / "fed", ["localhost"], port=443, days=30)
    return {
        "node": service_unit.node_unit(NodeDirectory(folder), "conclave"),
        "server": service_unit.server_unit(server, "conclave"),
    }


def test_units_allow_what_is_needed_and_no_more(tmp_path, folder):  # noqa: F811
    made = units(tmp_path, folder)
    settings = {kind: Counter(unit.splitlines()) for kind, unit in made.items()}
    assert settings["node"]["CPUQuota=200%"] == settings["node"]["MemoryMax=4024M"] == 1
    assert settings["node"][f'ReadWritePaths="{folder / "state"}" "{tmp_path}"'] == 1
    assert settings["node"]["CapabilityBoundingSet="] == 1
    assert settings["server"]["AmbientCapabilities=CAP_NET_BIND_SERVICE"] == 1  # for port 443
    assert all(lines["ProtectSystem=strict"] == 1 for lines in settings.values())


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="needs systemd-analyze")
def test_systemd_understands_the_units(tmp_path, folder):  # noqa: F811
    for kind, unit in units(tmp_path, folder).items():
        path = tmp_path / f"conclave-{kind}.service"
        path.write_text(unit.replace("User=conclave", "User=daemon"))
        done = subprocess.run(
            ["systemd-analyze", "verify", str(path)], capture_output=True, text=True, timeout=60, check=False
        )
        assert (done.returncode, str(path) in done.stderr) == (0, False), done.stderr


def test_a_path_that_systemd_would_read_otherwise_is_refused(tmp_path, folder):  # noqa: F811
    odd = folder.rename(tmp_path / "ward%7")
    with pytest.raises(BadInputError, match="cannot stand in a systemd unit"):
        service_unit.node_unit(NodeDirectory(odd), "conclave")
    with pytest.raises(BadInputError, match="cannot stand"):
        service_unit.node_unit(NodeDirectory(odd.rename(folder)), "root\nExecStartPre=/bin/sh")
