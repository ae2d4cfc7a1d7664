"""What happens to a machine: its disk is full, its clock is wrong, the server's certificate has run out."""

from __future__ import annotations

import re
import resource
from datetime import UTC, datetime, timedelta
from unittest import mock

import pytest
from federation import NODES, Federation
from soaking import asked, balanced, begin, connected, run_of, start_again, start_in_vain, supernode_log

from conclave.deployment.host.certificates import Authority
from conclave.deployment.server.proxy import reload_proxy

pytestmark = pytest.mark.slow

TIMEOUT_S = 10.0
SHIFTED_CLOCK = """import datetime, os, time
shift = float(os.environ["CLOCK_SHIFT_S"])
real = time.time
time.time = lambda: real() + shift
class Shifted(datetime.datetime):
    @classmethod
    def now(cls, tz=None):
        return cls.fromtimestamp(time.time(), tz)
    @classmethod
    def utcnow(cls):
        return cls.now(datetime.timezone.utc).replace(tzinfo=None)
datetime.datetime = Shifted
"""


def limit_files(federation: Federation, name: str, size: int) -> None:
    """Let a running node write nothing beyond ``size`` bytes of a file."""
    pid = federation.running[name].pid
    _, most = resource.prlimit(pid, resource.RLIMIT_FSIZE)
    resource.prlimit(pid, resource.RLIMIT_FSIZE, (size, most))


def test_a_node_that_cannot_write_releases_nothing_and_goes_on_when_it_can(federation):
    train = begin(federation, "full", 5, TIMEOUT_S)
    limit_files(federation, "second", len(federation.log("second")) + 4096)  # its log fits in, its ledger does not
    federation.wait_for("a round without it", lambda: "2 of 3 replies" in train.said)
    limit_files(federation, "second", resource.RLIM_INFINITY)
    assert train.end() == 0
    rounds = run_of(federation, "full-1").metrics()
    assert {"internal-error": 1} in [line["refused"] for line in rounds]
    assert rounds[-1]["accepted"] == 3
    charged = balanced(federation, "full-1")
    assert charged["first"] == charged["third"] == {1: 1, 2: 1, 3: 1, 4: 1, 5: 1}
    assert charged["second"][1] == charged["second"][5] == 1
    assert "refused with internal-error: the ledger cannot be written" in federation.log("second")
    assert "Traceback" not in federation.log("second")


def test_a_clock_ahead_is_refused_and_named(federation):
    federation.end("third")
    folder = federation.folder / "shifted-clock"
    folder.mkdir()
    (folder / "sitecustomize.py").write_text(SHIFTED_CLOCK)
    path = f"{folder}:{federation.environment.get('PYTHONPATH', '')}"
    start_in_vain(federation, "third", PYTHONPATH=path, CLOCK_SHIFT_S="60")
    federation.start("check", "node", "check", "third", PYTHONPATH=path, CLOCK_SHIFT_S="60")
    assert federation.running.pop("check").wait(60) == 1
    assert re.search(r"this machine's clock is \+6[0-3] s from the server's; set it", federation.log("check"))
    federation.end("third")
    start_again(federation, "third")
    federation.wait_for("the node", lambda: connected(federation, "third"), 90)


def certify(federation: Federation, seconds: float) -> None:
    """Start the server again with a certificate for so many seconds."""
    federation.end("server")
    tls = federation.folder / "server" / "tls"
    with mock.patch(
        "conclave.deployment.host.certificates._end", return_value=datetime.now(UTC) + timedelta(seconds=seconds)
    ):
        Authority(tls).issue_server(tls / "server", ["localhost", "127.0.0.1"], days=1)
    federation.start("server", "server", "start", "server")


def test_a_certificate_that_runs_out_is_named_everywhere_and_renewing_it_brings_all_back(federation):
    """While the server runs; what it says to itself has another one."""
    certify(federation, 20.0)
    federation.wait_for(
        "the server", lambda: federation.call("status", "--superlink", "server/operator").returncode == 0
    )
    refusal = "certificate is not accepted (certificate has expired)"
    federation.wait_for("TLS", lambda: refusal in federation.call("status", "--superlink", "server/operator").stderr)
    for command in (["status", "--superlink", "server/operator"], asked("expired", 1)):
        refused = federation.call(*command)
        assert refused.returncode == 2
        (sentence,) = refused.stderr.splitlines()
        assert refusal in sentence
    check = federation.call("node", "check", "first")
    assert check.returncode == 1
    assert "certificate has expired" in check.stdout
    ended = {name: federation.log(name).count("supernode: ended") for name in NODES}
    reload_proxy(federation.folder / "server")  # connections that are open live on otherwise
    for name in NODES:
        federation.wait_for(
            "the node to see it", lambda name=name: federation.log(name).count("supernode: ended") > ended[name]
        )
    before = {name: len(supernode_log(federation, name)) for name in NODES}
    federation.must("server", "renew", "server")
    federation.wait_for("TLS", lambda: federation.call("status", "--superlink", "server/operator").returncode == 0)
    for name in NODES:  # by itself, in a new life
        federation.wait_for(
            "the node", lambda name=name: "SuperNode ID" in supernode_log(federation, name)[before[name] :], 150
        )
    federation.wait_for_nodes(NODES)
    assert begin(federation, "renewed", 1).end() == 0
    assert balanced(federation, "renewed-1") == {name: {1: 1} for name in NODES}


def test_nothing_is_left_behind(federation):
    for name in (*NODES, "server"):
        assert "Traceback" not in federation.log(name)
