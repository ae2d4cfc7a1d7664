"""Mechanisms as a ledger spells them: exact, complete, and what one sample released is one event."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
from ledger_samples import Lines, genesis, new_ledger, request

from conclave.base.errors import BadInputError
from conclave.privacy.accounting.filter import charge_units
from conclave.privacy.accounting.mechanisms import ExponentialChoice, SampledGaussian, joint_noise
from conclave.privacy.ledger import BudgetExhaustedError
from conclave.privacy.ledger.mechanism_text import parse, spell
from conclave.privacy.ledger.reading.verification import audit_history

PARTS = {"delta": 1.2, "load": 9.0}
TOGETHER = SampledGaussian(sampling_rate=0.1, noise_multiplier=joint_noise(PARTS.values()), steps=3)


def text(mechanism, parts=()) -> str:
    return spell(mechanism, clip=1.0, numeric="fast", parts=dict(parts))


@pytest.mark.parametrize(
    "mechanism",
    [
        None,
        ExponentialChoice(epsilon=0.1 + 0.2, choices=3),
        *(SampledGaussian(sampling_rate=0.05, noise_multiplier=s, steps=7) for s in (1.958348, 0.1 + 0.2, 1e-2, 1e6)),
    ],
)
def test_a_spelling_is_exact(mechanism):
    assert parse(text(mechanism)) == mechanism
    assert json.dumps(json.loads(text(mechanism)), sort_keys=True, separators=(",", ":")) == text(mechanism)


@pytest.mark.parametrize(
    "mechanism",
    [
        ExponentialChoice(epsilon=1.0, choices=10**9 + 1),
        SampledGaussian(sampling_rate=0.05, noise_multiplier=1.1e9, steps=7),
        SampledGaussian(sampling_rate=0.9e-9, noise_multiplier=1.0, steps=7),
        SampledGaussian(sampling_rate=0.05, noise_multiplier=1.0, steps=10**9 + 1),
    ],
)
def test_what_no_audit_would_read_is_not_charged(mechanism, tmp_path):
    """Such an entry would stay for good: a violation to every audit, and an export that helps nobody to recover."""
    with pytest.raises(BadInputError, match="beyond what accountants can be trusted with"):
        text(mechanism)
    ledger = new_ledger(tmp_path)
    with pytest.raises((BadInputError, BudgetExhaustedError)):
        ledger.reserve(request(mechanism=mechanism), bytes(32))
    with pytest.raises((BadInputError, BudgetExhaustedError)):
        ledger.admit(request(mechanism=mechanism), 2)
    assert ledger.entries() == []


def test_parts_of_one_sample_are_charged_together():
    assert parse(text(TOGETHER, PARTS)) == TOGETHER
    assert json.loads(text(TOGETHER, PARTS))["parts"] == {"delta": "1.2", "load": "9"}
    assert TOGETHER.noise_multiplier < min(PARTS.values())


def test_more_noise_than_the_parts_have_together_is_refused_and_found(tmp_path):
    """The sabotage: gradient and load histogram of one sample, charged as if the histogram were not there."""
    apart = SampledGaussian(sampling_rate=0.1, noise_multiplier=1.2, steps=3)
    with pytest.raises(BadInputError, match="what is released from one sample is one event"):
        text(apart, PARTS)
    ledger = new_ledger(tmp_path)
    honest = request(mechanism=TOGETHER, parts=tuple(PARTS.items()), releases=("delta", "load"))
    ledger.reserve(honest, bytes(32))
    (entry,) = ledger.entries()
    assert int(entry.rdp_charge) == charge_units(TOGETHER, 3.4) > charge_units(apart, 3.4)
    assert audit_history(Lines(ledger.genesis, [entry])).findings == []
    forged = json.loads(entry.mechanism) | {"sigma": "1.2"}
    cheap = replace(
        entry, mechanism=json.dumps(forged, sort_keys=True, separators=(",", ":")),
        rdp_charge=str(charge_units(apart, 3.4)), rdp_total=str(charge_units(apart, 3.4)),
    )  # fmt: skip
    findings = audit_history(Lines(ledger.genesis, [cheap])).findings
    assert any("its sigma is 1.2, must be at most" in finding for finding in findings)


def test_choices_are_charged_by_their_curve_and_audited(tmp_path):
    ledger = new_ledger(tmp_path)
    choice = ExponentialChoice(epsilon=0.5, choices=4)
    ledger.reserve(request(kind="affinity", mechanism=choice, releases=("experts",)), bytes(32))
    (entry,) = ledger.entries()
    by_hand = 4 * min(0.5, 3.4 * 0.25 / 8)
    assert int(entry.rdp_charge) == pytest.approx(by_hand * 1e12, rel=1e-6)
    assert int(entry.rdp_charge) >= by_hand * 1e12
    audit = audit_history(Lines(ledger.genesis, [entry]))
    assert (audit.findings, audit.charges, set(audit.accountants)) == ([], 1, {"rdp"})
    cheap = replace(entry, rdp_charge="1", rdp_total="1")
    assert any("must be at least" in finding for finding in audit_history(Lines(genesis(), [cheap])).findings)


@pytest.mark.parametrize(
    "spelling",
    [
        "",
        "{}",
        "[]",
        "7",
        "[" * 100_000,
        '{"kind":"laplace"}',
        '{"kind":"gaussian","sampler":"shuffle","numeric":"fast","q":"1","sigma":"1","steps":1}',
        '{"kind":"gaussian","sampler":"poisson","numeric":"none","q":"1","sigma":"1","steps":1}',
        '{"kind":"gaussian","sampler":"poisson","numeric":"fast","q":"1","sigma":"nan","steps":1}',
        '{"kind":"gaussian","sampler":"poisson","numeric":"fast","q":"0","sigma":"1","steps":1}',
        '{"kind":"gaussian","sampler":"poisson","numeric":"fast","q":"1","sigma":"1","steps":0}',
        '{"kind":"gaussian","sampler":"poisson","numeric":"fast","q":"1","sigma":"1","steps":1,"parts":["1"]}',
        '{"kind":"gaussian","sampler":"poisson","numeric":"fast","q":"1","sigma":"1","steps":1,"parts":{"a":"0"}}',
        '{"kind":"exponential","epsilon":"0","choices":1}',
        '{"kind":"exponential","epsilon":"inf","choices":1}',
        '{"kind":"exponential","epsilon":"1"}',
    ],
)
def test_what_is_no_mechanism_is_refused(spelling):
    with pytest.raises(BadInputError):
        parse(spelling)
