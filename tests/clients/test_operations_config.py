"""The hours in which a node works."""

from __future__ import annotations

from datetime import time

import pytest
from plan_samples import plan

from conclave.base.errors import BadInputError
from conclave.clients.approvals import Approvals
from conclave.clients.folder.node_config import parse_node_config
from conclave.clients.operations_config import within
from conclave.protocol.messages import ProtocolError


@pytest.mark.parametrize(
    ("hours", "at", "works"),
    [
        ("09:00-17:00", "08:59", False), ("09:00-17:00", "09:00", True), ("09:00-17:00", "16:59:59", True),
        ("09:00-17:00", "17:00", False), ("20:00-06:00", "19:59", False), ("20:00-06:00", "20:00", True),
        ("20:00-06:00", "00:00", True), ("20:00-06:00", "05:59", True), ("20:00-06:00", "06:00", False),
        ("00:00-00:00", "12:00", True), ("07:00-07:00", "07:00", True),
    ],
)  # fmt: skip
def test_hours_may_pass_midnight(hours, at, works):
    assert within(hours, time.fromisoformat(at)) is works


@pytest.mark.parametrize(
    "hours",
    [
        "",
        "20-6",
        "20:00",
        "20:00-25:00",
        "20:00:00-06:00:00",
        "a",
        "20:00 06:00",
        "2000Z-0600Z",
        "20:00-0600Z",
        "20000-06000",
        "٢٠:00-06:00",
        "20:00-06:00\n",
    ],
)
def test_other_texts_are_no_hours(hours):
    document = {
        "dataset": {"id": "d", "data": "d", "declared_size": 1},
        "budget": {"epsilon": 1.0, "delta": 1e-5},
        "storage": {"witness": "w"},
        "limits": {"hours": hours},
    }
    with pytest.raises(BadInputError, match=r"limits\.hours.*must be two times of day"):
        parse_node_config(document, where="node.toml")


def test_outside_its_hours_a_node_refuses_as_if_it_were_paused(tmp_path):
    """Also in the middle of a run, and an approved plan. The server cannot tell it from a pause by hand."""
    clock = [time(21, 0)]
    approvals = Approvals(tmp_path / "plans", hours="20:00-06:00", now=lambda: clock[0])
    approvals.check(plan(), "s", needed=False)
    clock[0] = time(12, 0)
    with pytest.raises(ProtocolError, match=r"outside of limits\.hours") as caught:
        approvals.check(plan(), "s", needed=False)
    assert caught.value.code == "paused"
    assert not approvals.open
    clock[0] = time(5, 0)
    approvals.check(plan(), "s", needed=False)
