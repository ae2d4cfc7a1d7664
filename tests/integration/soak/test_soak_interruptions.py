"""Real processes that are killed, stopped, held up or cut off in the middle of a run, and what is left of it."""

from __future__ import annotations

import signal

import pytest
from federation import NODES
from soaking import balanced, begin, connected, kill, run_of, start_again, supernode_log

pytestmark = pytest.mark.slow

TIMEOUT_S = 8.0
RETURN_S = 150.0
"""A SuperNode that could not say good-bye is let in again when its server has missed it for a minute."""
RECONNECTED = ("Connection successful", "SuperNode ID", "is not in `RUNNING` status", "Failed to receive message")
"""What a SuperNode says that goes on with a connection, begins one, or is told that the run of what it does is over."""


def test_a_slow_node_is_missing_for_a_round_and_its_late_reply_counts_for_nothing(federation):
    train = begin(federation, "slow", 4, TIMEOUT_S)
    federation.running["second"].send_signal(signal.SIGSTOP)
    federation.wait_for("a round without it", lambda: "2 of 3 replies" in train.said)
    federation.running["second"].send_signal(signal.SIGCONT)
    assert train.end() == 0
    accepted = [line["accepted"] for line in run_of(federation, "slow-1").metrics()]
    assert sorted(accepted) == [2, 3, 3, 3]
    assert accepted[-1] == 3  # and not four: the late one is not among them
    charged = balanced(federation, "slow-1")
    assert charged == {node: {1: 1, 2: 1, 3: 1, 4: 1} for node in NODES}  # what came too late is paid for


def test_a_killed_node_is_missing_until_it_is_started_again(federation):
    train = begin(federation, "killed", 2, TIMEOUT_S)
    kill(federation, "second")
    assert train.end() == 0
    charged = balanced(federation, "killed-1")
    assert charged["first"] == charged["third"] == {1: 1, 2: 1}
    assert charged["second"] in ({1: 1}, {1: 1, 2: 1})  # the second where it died after the charge
    start_again(federation, "second")
    federation.wait_for("the node", lambda: connected(federation, "second"), RETURN_S)


def test_a_node_whose_connection_is_cut_comes_back_by_itself(federation, wire):
    """The middle of the way ends every connection and every new one: a TLS handshake breaks, and Flower gives up."""
    train = begin(federation, "cut", 2, TIMEOUT_S)
    wire.cut()
    federation.wait_for("the loss to be seen", lambda: "supernode: ended" in federation.log("third"))
    assert train.end() == 0
    wire.mend()
    federation.wait_for("the node", lambda: connected(federation, "third"), RETURN_S)
    charged = balanced(federation, "cut-1")
    assert charged["first"] == charged["second"] == {1: 1, 2: 1}
    assert set(charged["third"]) <= {1, 2}


def test_a_stopped_run_goes_on_and_no_round_is_charged_twice(federation):
    train = begin(federation, "stopped", 4)
    (run_id,) = [run["run_id"] for run in federation.status()["runs"] if run["status"] != "finished"]
    assert "stopped" in federation.must("stop", run_id, "--superlink", "server/operator")
    assert train.end() == 3
    assert f"conclave: run {run_id}: stopped" in train.said
    resumed = federation.must("train", "--resume", "stopped-1", "--superlink", "server/operator")
    assert "round 1 of" not in resumed
    assert "round 4 of 4: 3 of 3 replies" in resumed
    assert balanced(federation, "stopped-1") == {node: {1: 1, 2: 1, 3: 1, 4: 1} for node in NODES}


def test_a_killed_server_is_started_again_and_its_run_resumed(federation):
    train = begin(federation, "lost", 4)
    before = {name: len(supernode_log(federation, name)) for name in NODES}
    kill(federation, "server")
    assert train.end() == 3
    assert train.said.splitlines()[-1].startswith("conclave: localhost:")  # one sentence
    assert "not reachable" in train.said
    federation.start("server", "server", "start", "server")
    for name in NODES:  # each goes on, or ended with the server, and is let in again when it has been missed
        federation.wait_for(
            "the node",
            lambda name=name: any(word in supernode_log(federation, name)[before[name] :] for word in RECONNECTED),
            RETURN_S,
        )
    resumed = federation.must("train", "--resume", "lost-1", "--superlink", "server/operator")
    assert "round 4 of 4: 3 of 3 replies" in resumed
    assert balanced(federation, "lost-1") == {node: {1: 1, 2: 1, 3: 1, 4: 1} for node in NODES}
    assert all(run["status"] == "finished" for run in federation.status()["runs"])


def test_nothing_is_left_behind(federation):
    """After all that, nobody has died of an error that nobody caught."""
    for name in (*NODES, "server"):
        assert "Traceback" not in federation.log(name)
