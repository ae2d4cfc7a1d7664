"""Mechanisms as a ledger spells them: exact, complete, and what one sample released is one event."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from ledger_samples import Lines, genesis, new_ledger, request

from conclave.base.errors import BadInputError
from conclave.privacy.accounting.mechanisms import ExponentialChoice, SampledGaussian, joint_noise
from conclave.privacy.accounting.prices import charge_units
from conclave.privacy.ledger import BudgetExhaustedError, Entry, KeyRotation
from conclave.privacy.ledger.mechanism_text import (
    Charged,
    Restored,
    parse,
    parse_plan,
    parse_rotation,
    spell,
    spell_rotation,
)
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
    assert parse(text(mechanism)) == Charged(mechanism)
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
    assert parse(text(TOGETHER, PARTS)) == Charged(TOGETHER, PARTS)
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
    assert entry.mechanism == TOGETHER
    forged = json.loads(entry.mechanism_text) | {"sigma": "1.2"}
    cheap = replace(
        entry, mechanism_text=json.dumps(forged, sort_keys=True, separators=(",", ":")),
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


def test_an_entry_says_what_was_charged_and_keeps_its_text(tmp_path):
    ledger = new_ledger(tmp_path)
    ledger.admit(request(mechanism=TOGETHER, parts=tuple(PARTS.items()), releases=("delta", "load")), 1)
    ledger.reserve(request(mechanism=TOGETHER, parts=tuple(PARTS.items()), releases=("delta", "load")), bytes(32))
    admitted, reserved = ledger.entries()
    assert reserved.mechanism == TOGETHER
    assert parse(reserved.mechanism_text).parts == PARTS
    aside = parse_plan(admitted.mechanism_text)
    assert (aside.units, aside.planned) == (charge_units(TOGETHER, 3.4), ((reserved.mechanism_text, 1),))
    with pytest.raises(BadInputError, match="its mechanism cannot be read"):
        _ = admitted.mechanism  # it is no charge
    for text in ("{", '{"kind":"laplace"}', '{"kind": "none"}'):
        document = json.loads(reserved.line) | {"mechanism": text}
        line = json.dumps(document, sort_keys=True, separators=(",", ":")).encode()
        assert Entry.parse(line).line == line  # what is hashed is what is there, whatever it says
        assert Entry.parse(line).mechanism_text == text
    for name in ("mechanism_text", "Mechanism"):
        renamed = json.loads(reserved.line)
        renamed[name] = renamed.pop("mechanism")
        with pytest.raises(BadInputError, match="an entry's fields"):
            Entry.parse(json.dumps(renamed))


UNREADABLE = ["", "null", "7", "[]", "{}", "[" * 100_000, '{"units":1e999,"charges":1,"mechanism":"x"}', '"x"']


@pytest.mark.parametrize("read", [parse_plan, parse_rotation, Restored.parse])
@pytest.mark.parametrize("text", [*UNREADABLE, '{"kind":"none"}', '{"units":"-1","charges":1,"mechanism":"x"}'])
def test_what_no_ledger_writes_is_one_error_whatever_is_wrong(read, text):
    with pytest.raises(ValueError):
        read(text)


def test_what_happened_is_read_as_it_was_spelled():
    assert Restored.parse(Restored("m", proven=True).spell()) == Restored("m", proven=True)
    for no_proof in ("false", "1", '"true"', "null"):
        assert not Restored.parse(f'{{"kind":"restore","machine":"m","proven":{no_proof}}}').proven
    old, new = (Ed25519PrivateKey.from_private_bytes(bytes([n]) * 32) for n in (1, 2))
    rotation = KeyRotation.sign("0" * 32, old, new)
    assert parse_rotation(spell_rotation(rotation)) == rotation


ROOT = Path(__file__).resolve().parents[3]
FOLDERS = ("audit", "cli", "clients", "deployment", "privacy", "protocol", "report", "server/node_level")


def test_nobody_else_reads_or_spells_what_an_entry_says():
    """A second reader would sooner or later read something else."""
    by_hand = re.compile(r"""json\.loads\([^()]*mechanism|["']kind["']: ["']|\{"kind":""")
    found = [str(path.relative_to(ROOT)) for folder in FOLDERS for path in (ROOT / folder).rglob("*.py")
             if by_hand.search(path.read_text())]  # fmt: skip
    assert sorted(found) == ["privacy/ledger/mechanism_text.py"]


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
