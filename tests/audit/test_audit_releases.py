"""The audit of choices and metrics: quiet on what is right, and it names what was broken."""

from __future__ import annotations

import pytest
import torch

import conclave.audit.model
import conclave.clients.chooser
import conclave.clients.evaluator
from conclave.audit.model import audit_scenario
from conclave.privacy.releases.private_metrics import MetricSums
from conclave.server.scenario import read_scenario
from conclave.simulations.shipped import find

CHANGES = {
    "model.width": 8,
    "federation.rounds": 20,
    "federation.assignment": "affinity",
    "affinity": {"epsilon": 0.2, "every": 10},
    "evaluation": {"every": 10},
}
CHECKS = ("choice sensitivity", "metric sensitivity", "metric noise")


@pytest.fixture
def _releases_alone(monkeypatch):
    """Leave out the attacks on training, which are tested for themselves and take most of the time."""
    monkeypatch.setattr(conclave.audit.model, "audit_model", lambda subject: [])


def audit():
    found = audit_scenario(read_scenario(find("digits"), CHANGES))
    return {finding.check: finding.violation for finding in found if finding.check in CHECKS}


def test_what_is_right_is_not_refuted():
    assert audit() == dict.fromkeys(CHECKS)


@pytest.mark.usefixtures("_releases_alone")
def test_text_and_groups_are_audited_too():
    """Each synthetic record stands for a unit."""
    changes = {
        "model.width": 16, "model.layers": 1, "federation.rounds": 4, "evaluation": {"every": 4},
        "privacy.unit": "group", "privacy.records_per_unit": 4,
    }  # fmt: skip
    found = audit_scenario(read_scenario(find("stdlib-text"), changes))
    assert {f.check: f.violation for f in found if f.check in CHECKS} == dict.fromkeys(CHECKS[1:])


def test_a_plan_without_them_is_audited_without_them():
    found = audit_scenario(read_scenario(find("digits"), {"model.width": 8}))
    assert not {finding.check for finding in found} & set(CHECKS)


def counting(plan, network, batch):
    """Every unit's value tells how many others are there."""
    return torch.full((len(batch["label"]),), len(batch["label"]) / 8.0)


def doubled(self, value_B, units):
    real_add(self, value_B, units)
    real_add(self, value_B, units)


real_add, real_noised, real_utilities = MetricSums.add, MetricSums.noised, conclave.clients.chooser.utilities
SABOTAGE = {
    "a unit counts twice": (MetricSums, "add", doubled, "metric sensitivity"),
    "no noise": (MetricSums, "noised", lambda self, noise, secret: real_noised(self, None, secret), "metric noise"),
    "sigma halved": (
        MetricSums, "noised", lambda self, noise, secret: real_noised(self, 0.8 * noise, secret), "metric noise",
    ),
    "noise used again": (
        MetricSums, "noised", lambda self, noise, secret: real_noised(self, noise, bytes(32)), "metric noise",
    ),
    "one draw for both sums": (
        MetricSums, "noised",
        lambda self, noise, secret: real_noised(self, noise, secret)[:1].expand(2) - self.exact()[0] + self.exact(),
        "metric noise",
    ),
    "utilities twice as large": (
        conclave.clients.chooser, "utilities",
        lambda *args: [2.0 * utility for utility in real_utilities(*args)], "choice sensitivity",
    ),
    "utilities averaged by the real size": (
        conclave.clients.chooser, "utilities",
        lambda plan, sent, records: [
            10.0 * utility / len(records["label"]) for utility in real_utilities(plan, sent, records)
        ],
        "choice sensitivity",
    ),
}  # fmt: skip


@pytest.mark.usefixtures("_releases_alone")
@pytest.mark.parametrize("kind", SABOTAGE)
def test_what_is_broken_is_named(monkeypatch, kind):
    owner, name, broken, check = SABOTAGE[kind]
    monkeypatch.setattr(owner, name, broken)
    found = audit()
    assert [name for name, violation in found.items() if violation] == [check]


@pytest.mark.usefixtures("_releases_alone")
def test_a_metric_that_couples_units_is_named(monkeypatch):
    monkeypatch.setattr(conclave.clients.evaluator, "_values", counting)
    assert "moved the sums by 2.069, must be at most 1" in audit()["metric sensitivity"]
