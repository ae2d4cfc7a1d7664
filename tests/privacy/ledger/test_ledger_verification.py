"""The ledger audit finds what was altered, and only that."""

from __future__ import annotations

from dataclasses import asdict, fields, replace

import pytest
from ledger_samples import genesis, new_ledger, request, spend
from privacy.ledger_audit import audit_entries, parse_mechanism
from privacy.ledger_entry import Entry

from model.errors import BadInputError
from privacy.accounting import epsilon_of


@pytest.fixture
def history(tmp_path):
    ledger = new_ledger(tmp_path)
    spend(ledger, 3)
    ledger.reserve(request(4), bytes(32))
    return ledger.genesis, ledger.entries(), ledger.epsilon_spent


def rehash(head, entries):
    """Recompute the whole chain, as a careful forger without the signing key would."""
    prev, out = head.hash, []
    for entry in entries:
        entry = replace(entry, prev_hash=prev, entry_hash="")
        entry = replace(entry, entry_hash=entry.computed_hash())
        prev = entry.entry_hash
        out.append(entry)
    return out


def test_a_true_ledger_holds_and_epsilon_is_recomputed(history):
    head, entries, spent = history
    result = audit_entries(head, entries)
    assert result.findings == []
    assert (result.charges, result.abandoned, result.seeded) == (4, 0, False)
    assert result.epsilon == spent
    total = sum(int(entry.rdp_charge) for entry in entries)
    assert spent == epsilon_of(total, 3.4, 1e-5)
    assert 0 < result.accountants["pld"] < result.accountants["rdp"] <= result.epsilon + 1e-9


def test_an_empty_ledger_holds(tmp_path):
    ledger = new_ledger(tmp_path)
    result = audit_entries(ledger.genesis, ledger.entries())
    assert (result.findings, result.epsilon, result.charges) == ([], 0.0, 0)


@pytest.mark.parametrize("field", [f.name for f in fields(Entry) if f.name != "signature"])
def test_altering_any_field_is_found(history, field):
    head, entries, _ = history
    old = getattr(entries[2], field)
    entries[2] = replace(entries[2], **{field: old + 1 if isinstance(old, int) else f"{old}0"})
    assert audit_entries(head, entries).findings


@pytest.mark.parametrize("position", range(6))
def test_deleting_or_swapping_an_entry_is_found(history, position):
    head, entries, _ = history
    assert audit_entries(head, entries[:position] + entries[position + 1 :]).findings
    swapped = [*entries]
    swapped[position], swapped[position + 1] = swapped[position + 1], swapped[position]
    assert audit_entries(head, swapped).findings


def test_another_genesis_breaks_the_chain(history):
    head, entries, _ = history
    assert audit_entries(replace(head, epsilon="9"), entries).findings


def test_a_price_below_its_mechanism_is_found_even_in_a_rehashed_chain(history):
    head, entries, spent = history
    cheap = str(int(entries[0].rdp_charge) // 2)
    forged = [replace(entry) for entry in entries]
    forged[0] = replace(forged[0], rdp_charge=cheap)
    total = 0
    for index, entry in enumerate(forged):
        total += int(entry.rdp_charge)
        forged[index] = replace(entry, rdp_total=str(total))
    result = audit_entries(head, rehash(head, forged))
    assert any("must be at least" in finding for finding in result.findings)
    assert result.epsilon == pytest.approx(spent, rel=1e-6)  # recomputed from the mechanism, not believed


def test_a_charge_that_comes_from_nowhere_is_found(history):
    head, entries, _ = history
    entries[1] = replace(entries[1], charge_id="0" * 64)
    findings = audit_entries(head, rehash(head, entries)).findings
    assert any("COMMITTED cannot follow nothing" in finding for finding in findings)


def test_overspending_is_found(tmp_path):
    ledger = new_ledger(tmp_path)
    spend(ledger, 25)
    small = genesis(epsilon=3.0)
    rich = replace(ledger.genesis, epsilon="3", order=small.order, rdp_budget=small.rdp_budget)
    findings = audit_entries(rich, rehash(rich, ledger.entries())).findings
    assert any("must be at most the budget of 3" in finding for finding in findings)
    greedy = replace(ledger.genesis, rdp_budget=str(10**15))
    assert any("RDP budget" in finding for finding in audit_entries(greedy, rehash(greedy, ledger.entries())).findings)


def test_training_without_privacy_is_infinite_and_never_passes_in_a_deployment(tmp_path):
    ledger = new_ledger(tmp_path)
    spend(ledger, 2, sigma=None)
    result = audit_entries(ledger.genesis, ledger.entries())
    assert (result.findings, result.epsilon, result.accountants) == ([], float("inf"), {})
    deployed = replace(ledger.genesis, mode="deployment")
    findings = audit_entries(deployed, rehash(deployed, ledger.entries())).findings
    assert any("without privacy" in finding for finding in findings)


def test_seeded_randomness_is_reported_and_never_passes_in_a_deployment(tmp_path):
    ledger = new_ledger(tmp_path)
    spend(ledger, 1, rng="seeded")
    assert audit_entries(ledger.genesis, ledger.entries()).seeded
    deployed = replace(ledger.genesis, mode="deployment")
    findings = audit_entries(deployed, rehash(deployed, ledger.entries())).findings
    assert any("seeded randomness" in finding for finding in findings)


@pytest.mark.parametrize(
    "text",
    ["", "{}", "[]", '{"kind":"laplace"}', '{"kind":"gaussian","sampler":"shuffle","q":"1","sigma":"1","steps":1}'],
)
def test_an_unknown_mechanism_is_no_mechanism(text):
    with pytest.raises(BadInputError, match="cannot be read"):
        parse_mechanism(text)


def test_the_mechanism_spelling_is_exact():
    for sigma in (1.958348, 0.1 + 0.2, 1e-2):
        item = request(sigma=sigma)
        assert parse_mechanism(item.mechanism_json()) == item.mechanism
    assert parse_mechanism(request(sigma=None).mechanism_json()) is None


def test_the_result_is_plain_data(history):
    head, entries, _ = history
    assert set(asdict(audit_entries(head, entries))) >= {"ledger_id", "epsilon", "budget", "findings"}
