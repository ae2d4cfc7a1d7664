"""What a node's owner approved: kept over restarts, bounded, and asked again for every other plan."""

from __future__ import annotations

import stat
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest
from node_samples import HELD, body, make_node
from plan_samples import plan, request

import conclave.clients.approvals
from conclave.base.errors import BadInputError
from conclave.clients.approvals import Approvals
from conclave.protocol.codec import encode
from conclave.protocol.messages import AdmitRequest, ProtocolError

PLAN, OTHER = plan(), plan(rounds=11)


def code(call, *args, **options):
    with pytest.raises(ProtocolError) as caught:
        call(*args, **options)
    return caught.value.code


@pytest.fixture
def approvals(tmp_path):
    return Approvals(tmp_path / "plans")


def test_a_plan_waits_until_it_is_approved(approvals, tmp_path):
    assert code(approvals.check, PLAN, "digits", needed=True) == "awaiting-approval"
    (waiting,) = approvals.waiting()
    assert (waiting.hash, waiting.scenario, waiting.plan) == (PLAN.hash, "digits", PLAN)
    approvals.approve(PLAN.hash[:8])
    approvals.check(PLAN, "digits", needed=True)
    Approvals(tmp_path / "plans").check(PLAN, "digits", needed=True)  # after a restart
    assert approvals.waiting() == []
    assert code(approvals.check, OTHER, "digits", needed=True) == "awaiting-approval"


def test_asking_again_changes_nothing(approvals):
    for _ in range(3):
        assert code(approvals.check, PLAN, "digits", needed=True) == "awaiting-approval"
    assert len(approvals.waiting()) == 1


def test_what_waits_is_for_the_owner_alone_and_bounded(approvals, tmp_path, monkeypatch):
    monkeypatch.setattr(conclave.clients.approvals, "_MOST_WAITING", 2)
    for rounds in range(1, 6):
        assert code(approvals.check, plan(rounds=rounds), "s", needed=True) == "awaiting-approval"
    files = list((tmp_path / "plans").glob("*.waiting"))
    assert len(files) == 2
    assert {stat.S_IMODE(path.stat().st_mode) for path in files} == {0o600}


def test_an_ambiguous_or_unknown_hash_approves_nothing(approvals):
    for asked in (PLAN, OTHER):
        code(approvals.check, asked, "s", needed=True)
    for prefix in ("", "zz"):
        with pytest.raises(BadInputError, match="must be one"):
            approvals.approve(prefix)
    assert len(approvals.waiting()) == 2


def test_a_damaged_file_is_named(approvals, tmp_path):
    code(approvals.check, PLAN, "s", needed=True)
    (path,) = (tmp_path / "plans").glob("*.waiting")
    for text in ("{", "[" * 100_000, '{"scenario": "\\ud800"}', "[]"):
        path.write_text(text)
        with pytest.raises(BadInputError, match="damaged"):
            approvals.waiting()


def test_a_paused_node_refuses_whatever_is_approved(approvals):
    code(approvals.check, PLAN, "s", needed=True)
    approvals.approve(PLAN.hash)
    approvals.pause()
    assert code(approvals.check, PLAN, "s", needed=True) == "paused"
    assert code(approvals.check, PLAN, "s", needed=False) == "paused"
    approvals.resume()
    approvals.check(PLAN, "s", needed=True)


def test_a_node_asks_its_owner_before_anything_is_charged(tmp_path, approvals):
    node = replace(make_node(tmp_path), approvals=approvals)
    asked = request(held=HELD)
    assert code(node.admit, AdmitRequest(run_id="1", scenario="test", plan=PLAN)) == "awaiting-approval"
    assert code(node.train, asked, encode(asked, body())) == "awaiting-approval"
    assert node.ledger.entries() == []
    approvals.approve(PLAN.hash)
    node.admit(AdmitRequest(run_id="1", scenario="test", plan=PLAN))
    approvals.pause()
    assert code(node.train, asked, encode(asked, body())) == "paused"
    assert len(node.ledger.entries()) == 1


def test_an_approval_is_for_one_run_however_the_server_names_it(tmp_path, approvals):
    """Approved once, a plan ran under ever new names until the budget was gone."""
    node = replace(make_node(tmp_path), approvals=approvals)

    def ask(run_id, round_number=1):
        asked = request(held=HELD, run_id=run_id, round=round_number)
        return node.train(asked, encode(asked, body()))

    code(approvals.check, PLAN, "s", needed=True)
    approvals.approve(PLAN.hash)
    for run_id in ("1", "2"):  # nothing is drawn yet: the first to draw has it
        node.admit(AdmitRequest(run_id=run_id, scenario="test", plan=PLAN))
    ask("2")
    before = node.ledger.epsilon_spent
    for run_id in ("1", "3"):
        assert code(ask, run_id) == "awaiting-approval"
        assert code(node.admit, AdmitRequest(run_id=run_id, scenario="test", plan=PLAN)) == "awaiting-approval"
    assert node.ledger.epsilon_spent == before
    ask("2", 2)  # and goes on with it
    restarted = replace(node, approvals=Approvals(tmp_path / "plans"))
    assert code(restarted.admit, AdmitRequest(run_id="3", scenario="test", plan=PLAN)) == "awaiting-approval"
    approvals.approve(PLAN.hash)  # it waits once more
    ask("3")
    assert code(ask, "1") == "awaiting-approval"
    ask("2", 3)  # the second approval took nothing from the first


def test_of_runs_that_ask_at_once_one_has_the_approval(approvals, tmp_path):
    code(approvals.check, PLAN, "s", needed=True)
    approvals.approve(PLAN.hash)
    began, refused = list[str](), list[str]()
    ready = threading.Barrier(8)

    def begin(run_id: str) -> None:
        ready.wait()
        try:
            approvals.begin(PLAN, "s", run_id)
            began.append(run_id)
        except ProtocolError as error:
            refused.append(error.code)

    with ThreadPoolExecutor(8) as threads:
        for result in [threads.submit(begin, f"run-{number}") for number in range(8)]:
            result.result()
    assert (len(began), refused) == (1, ["awaiting-approval"] * 7)
    assert [path.read_text() for path in (tmp_path / "plans").glob("*.run*")] == began


def test_no_more_is_set_aside_than_was_approved_however_runs_are_named(tmp_path, approvals):
    """A server that admits one approved plan under ever new names would keep the whole budget from everybody else."""
    node = replace(make_node(tmp_path), approvals=approvals)
    code(approvals.check, PLAN, "s", needed=True)
    approvals.approve(PLAN.hash)
    admit = {n: AdmitRequest(run_id=n, scenario="test", plan=PLAN) for n in ("1", "2", "3", "4")}
    node.admit(admit["1"])
    once = node.ledger.units_set_aside
    for name in ("2", "3", "3"):
        node.admit(admit[name])
        assert node.ledger.units_set_aside == once
    assert code(node.admit, admit["1"]) == "not-allowed"  # it gave way
    asked = request(held=HELD, run_id="3")
    node.train(asked, encode(asked, body()))
    code(approvals.check, PLAN, "s", needed=True, run_id="4")
    approvals.approve(PLAN.hash)
    left = node.ledger.units_set_aside
    node.admit(admit["4"])
    assert node.ledger.units_set_aside == left + once  # a run that draws keeps what is its own
    states = [(entry.state, entry.run_id) for entry in node.ledger.entries()]
    assert [run for state, run in states if state == "CLOSED"] == ["1", "2"]


def test_an_approval_of_an_earlier_release_is_for_the_run_that_goes_on(tmp_path, approvals):
    code(approvals.check, PLAN, "s", needed=True)
    (waiting,) = (tmp_path / "plans").glob("*.waiting")
    waiting.rename(waiting.with_suffix(".approved"))
    approvals.begin(PLAN, "s", "5")
    approvals.begin(PLAN, "s", "5")
    assert code(approvals.begin, PLAN, "s", "6") == "awaiting-approval"


def test_the_policy_may_do_without(tmp_path, approvals):
    node = replace(make_node(tmp_path, unapproved_plans=True), approvals=approvals)
    assert node.admit(AdmitRequest(run_id="1", scenario="test", plan=PLAN)).plan_hash == PLAN.hash
    assert approvals.waiting() == []
