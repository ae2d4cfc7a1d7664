"""The ledger audit finds what was altered, and only that."""

from __future__ import annotations

import contextlib
import json
import random
from dataclasses import asdict, fields, replace

import pytest
from ledger_samples import KEY, Lines, genesis, new_ledger, request, spend
from ledger_tampering import NEW_KEY, STRANGER, Forger, RawLines, long_life, rehash, sealed

from conclave.base.canonical import canonical_json, sha256
from conclave.base.errors import BadInputError
from conclave.privacy.accounting.filter import epsilon_of
from conclave.privacy.ledger import Entry, Genesis, KeyRotation, SignedHead
from conclave.privacy.ledger.heads import current_key, public_hex
from conclave.privacy.ledger.mechanism_text import parse
from conclave.privacy.ledger.reading.history import LedgerExport
from conclave.privacy.ledger.reading.spending import budget_of
from conclave.privacy.ledger.reading.verification import audit_history

CHEAP = request(sigma=20.0)


@pytest.fixture
def history(tmp_path):
    ledger = new_ledger(tmp_path)
    spend(ledger, 3)
    ledger.reserve(request(4), bytes(32))
    return ledger.genesis, ledger.entries(), ledger.head, ledger.epsilon_spent


@pytest.fixture(scope="module")
def life(tmp_path_factory):
    return long_life(tmp_path_factory.mktemp("life"))


def findings(of, entries, **options):
    return audit_history(Lines(of, entries, **options)).findings


def says(result, *words):
    return any(all(word in finding for word in words) for finding in result.findings)


# What was there before heads were signed: a forger who keeps the chain, and even one who has the key.


def test_a_true_ledger_holds_and_epsilon_is_recomputed(history):
    head, entries, _, spent = history
    result = audit_history(Lines(head, entries))
    assert result.findings == []
    assert (result.entries, result.charges, result.committed, result.abandoned, result.pending) == (7, 4, 3, 0, 1)
    assert (result.seeded, result.rotations, result.restored, result.witnessed) == (False, 0, 0, False)
    assert result.epsilon == spent
    total = sum(int(entry.rdp_charge) for entry in entries)
    assert spent == epsilon_of(total, 3.4, 1e-5)
    assert 0 < result.accountants["pld"] < result.accountants["rdp"] <= result.epsilon + 1e-9


def test_an_empty_ledger_holds(tmp_path):
    ledger = new_ledger(tmp_path)
    result = audit_history(RawLines(ledger.genesis, [], ledger.head))
    assert (result.findings, result.epsilon, result.charges, result.entries) == ([], 0.0, 0, 0)


@pytest.mark.parametrize("vouched_for", [False, True])
@pytest.mark.parametrize("field", [f.name for f in fields(Entry)])
def test_altering_any_field_is_found(history, field, vouched_for):
    head, entries, signed, _ = history
    old = getattr(entries[2], field)
    entries[2] = replace(entries[2], **{field: old + 1 if isinstance(old, int) else f"{old}0"})
    # Even the owner's signature over the altered lines does not help: the chain breaks at the next line.
    assert findings(head, entries, key=KEY if vouched_for else None, head=signed)


@pytest.mark.parametrize("position", range(6))
def test_deleting_or_swapping_an_entry_is_found(history, position):
    head, entries, _, _ = history
    assert findings(head, entries[:position] + entries[position + 1 :])
    swapped = [*entries]
    swapped[position], swapped[position + 1] = swapped[position + 1], swapped[position]
    assert findings(head, swapped)


def test_another_genesis_breaks_the_chain(history):
    head, entries, _, _ = history
    assert findings(replace(head, epsilon="9"), entries)


def test_a_price_below_its_mechanism_is_found_even_in_a_rehashed_chain(history):
    head, entries, _, spent = history
    cheap = str(int(entries[0].rdp_charge) // 2)
    forged = [replace(entry) for entry in entries]
    forged[0] = replace(forged[0], rdp_charge=cheap)
    total = 0
    for index, entry in enumerate(forged):
        total += int(entry.rdp_charge)
        forged[index] = replace(entry, rdp_total=str(total))
    result = audit_history(Lines(head, rehash(head, forged)))
    assert says(result, "must be at least")
    assert result.epsilon == pytest.approx(spent, rel=1e-6)  # recomputed from the mechanism, not believed


def test_a_charge_that_comes_from_nowhere_is_found(history):
    head, entries, _, _ = history
    entries[1] = replace(entries[1], charge_id="0" * 64)
    result = audit_history(Lines(head, rehash(head, entries)))
    assert says(result, "COMMITTED cannot follow nothing")


def test_overspending_is_found(tmp_path):
    ledger = new_ledger(tmp_path)
    spend(ledger, 25)
    small = genesis(epsilon=3.0)
    rich = replace(ledger.genesis, epsilon="3", order=small.order, rdp_budget=small.rdp_budget)
    assert says(audit_history(Lines(rich, rehash(rich, ledger.entries()))), "spends more than the budget of 3")
    greedy = replace(ledger.genesis, rdp_budget=str(10**15))
    assert says(audit_history(Lines(greedy, rehash(greedy, ledger.entries()))), "RDP budget")


def test_training_without_privacy_is_infinite_and_never_passes_in_a_deployment(tmp_path):
    ledger = new_ledger(tmp_path)
    spend(ledger, 2, sigma=None)
    result = audit_history(Lines(ledger.genesis, ledger.entries()))
    assert (result.findings, result.epsilon, result.accountants) == ([], float("inf"), {})
    deployed = replace(ledger.genesis, mode="deployment")
    assert says(audit_history(Lines(deployed, rehash(deployed, ledger.entries()))), "without privacy")


def test_seeded_randomness_is_reported_and_never_passes_in_a_deployment(tmp_path):
    ledger = new_ledger(tmp_path)
    spend(ledger, 1, rng="seeded")
    assert audit_history(Lines(ledger.genesis, ledger.entries())).seeded
    deployed = replace(ledger.genesis, mode="deployment")
    assert says(audit_history(Lines(deployed, rehash(deployed, ledger.entries()))), "seeded randomness")


GAUSSIAN = {"kind": "gaussian", "sampler": "poisson", "q": "1", "sigma": "1", "steps": 1}


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{}",
        "[]",
        "null",
        "[" * 100_000,
        '{"kind":"laplace"}',
        *(
            json.dumps(GAUSSIAN | change)
            for change in (
                {"sampler": "shuffle"}, {"q": "0"}, {"q": "-0.5"}, {"q": "1.5"}, {"q": "nan"}, {"q": None},
                {"q": "1e-300"}, {"sigma": "0"}, {"sigma": "-1"}, {"sigma": "inf"}, {"sigma": []}, {"steps": 0},
                {"steps": -3}, {"steps": float("inf")}, {"steps": float("nan")}, {"steps": 10**40}, {"steps": "many"},
            )
        ),
    ],
)  # fmt: skip
def test_an_unknown_mechanism_is_no_mechanism(text):
    with pytest.raises(BadInputError, match="cannot be read"):
        parse(text)
    result = Forger().charge(CHEAP, mechanism=text).audit()
    assert says(result, "mechanism cannot be read")


def test_the_mechanism_spelling_is_exact():
    for sigma in (1.958348, 0.1 + 0.2, 1e-2):
        item = request(sigma=sigma)
        assert parse(item.mechanism_json()).mechanism == item.mechanism
    assert parse(request(sigma=None).mechanism_json()).mechanism is None


def test_the_result_is_plain_data(history):
    head, entries, _, _ = history
    assert set(asdict(audit_history(Lines(head, entries)))) >= {"ledger_id", "epsilon", "budget", "findings"}


# The head.


def test_a_long_life_holds(life):
    result = audit_history(LedgerExport(life.export), witness=life.witness.read(), receipts=life.heads.values())
    assert result.findings == []
    assert (result.entries, result.charges, result.committed, result.abandoned, result.pending) == (100, 47, 46, 1, 0)
    assert (result.rotations, result.restored, result.unproven, result.witnessed) == (1, 1, False, True)
    assert result.receipts == len(life.heads)
    assert result.accountants["pld"] < result.accountants["rdp"] <= result.epsilon


def test_a_head_must_be_of_the_last_entry_and_signed(history):
    head, entries, signed, _ = history
    last = entries[-1].hash
    assert findings(head, entries, key=None, head=signed) == []
    bad = [
        SignedHead(ledger_id=head.ledger_id, seq=7, hash=last, signature="0" * 128),
        SignedHead.sign(STRANGER, head.ledger_id, 7, last),
        SignedHead.sign(KEY, head.ledger_id, 6, entries[5].hash),  # true, but not of the last entry
        SignedHead.sign(KEY, head.ledger_id, 8, last),
        SignedHead.sign(KEY, head.ledger_id, 7, "0" * 64),
        SignedHead.sign(KEY, "0" * 32, 7, last),
    ]
    for other in bad:
        assert findings(head, entries, key=None, head=other), other
    for field in ("seq", "hash", "ledger_id"):  # a signature covers all of them
        altered = signed.model_copy(update={field: getattr(bad[-1 if field == "ledger_id" else 2], field)})
        assert not altered.signed_by(public_hex(KEY))


# Receipts and the witness.


def test_receipts_on_the_chain_hold(history):
    head, entries, _, _ = history
    receipts = [SignedHead.sign(KEY, head.ledger_id, e.seq, e.hash) for e in entries]
    receipts.append(SignedHead.sign(KEY, head.ledger_id, 0, head.hash))
    result = audit_history(Lines(head, entries), receipts=receipts)
    assert (result.findings, result.receipts) == ([], 8)


def test_a_receipt_that_the_chain_does_not_have_is_found(history):
    head, entries, _, _ = history
    name = head.ledger_id
    cases = {
        "entries are missing": SignedHead.sign(KEY, name, 9, "e" * 64),  # beyond the end
        "another history": SignedHead.sign(KEY, name, 3, "e" * 64),
        "proves nothing": SignedHead.sign(STRANGER, name, 3, "e" * 64),
        "not signed with the ledger's key": SignedHead.sign(STRANGER, name, 3, entries[2].hash),
        "is of ledger": SignedHead.sign(KEY, "0" * 32, 3, entries[2].hash),
    }
    for words, receipt in cases.items():
        for options in ({"receipts": [receipt]}, {"witness": receipt}):
            result = audit_history(Lines(head, entries), **options)
            assert says(result, words), (words, result.findings)


def test_a_witness_may_be_behind_or_equal_but_not_ahead(history):
    head, entries, _, _ = history
    seen = [SignedHead.sign(KEY, head.ledger_id, e.seq, e.hash) for e in entries]
    cut = entries[:5]
    assert audit_history(Lines(head, cut), witness=seen[3]).findings == []
    assert audit_history(Lines(head, cut), witness=seen[4]).findings == []
    ahead = audit_history(Lines(head, cut), witness=seen[5])
    assert says(ahead, "ends at entry 5", "witness proves entry 6")
    assert ahead.witnessed
    assert not audit_history(Lines(head, cut)).witnessed


# Keys.


def test_a_rotation_holds_and_receipts_of_both_keys_with_it():
    forger = Forger().charge(CHEAP).charge(CHEAP, "COMMITTED")
    early = forger.head
    forger.rotate(NEW_KEY)
    at = forger.head
    forger.charge(request(2, sigma=20.0))
    result = forger.audit(receipts=[early, at, forger.head], witness=forger.head)
    assert (result.findings, result.rotations) == ([], 1)
    old_key_later = SignedHead.sign(KEY, forger.genesis.ledger_id, 4, forger.entries[3].hash)
    new_key_earlier = SignedHead.sign(NEW_KEY, forger.genesis.ledger_id, 2, forger.entries[1].hash)
    for receipt in (old_key_later, new_key_earlier):
        assert says(forger.audit(receipts=[receipt]), "not signed with the ledger's key")
    forger.key = KEY
    assert says(forger.audit(), "head is not signed with the ledger's key")  # the replaced key vouches for nothing


def test_a_rotation_that_both_keys_did_not_sign_is_found():
    name = genesis().ledger_id
    by_stranger = KeyRotation.sign(name, STRANGER, NEW_KEY)
    good = KeyRotation.sign(name, KEY, NEW_KEY)
    elsewhere = KeyRotation.sign("0" * 32, KEY, NEW_KEY)
    bad = [
        {"by_old": by_stranger.by_old},
        {"by_old": by_stranger.by_old, "old_key": by_stranger.old_key},  # does not start at the ledger's key
        {"by_new": good.by_old},
        {"by_old": elsewhere.by_old, "by_new": elsewhere.by_new},
        {"by_new": "0"},
        {"extra": 1},
    ]
    for changes in bad:
        forger = Forger().charge(CHEAP).rotate(NEW_KEY, **changes)
        result = forger.audit()
        assert says(result, "did not both sign"), changes
        assert says(result, "head is not signed"), changes  # so the other key does not count
        assert result.rotations == 0
    assert current_key(name, public_hex(KEY), [good]) == public_hex(NEW_KEY)
    assert current_key(name, public_hex(KEY), [good, by_stranger]) is None
    assert current_key(name, public_hex(KEY), [good, KeyRotation.sign(name, NEW_KEY, STRANGER)]) == public_hex(STRANGER)
    assert current_key(name, public_hex(KEY), []) == public_hex(KEY)


def test_the_ledgers_name_belongs_to_its_key():
    own = genesis()
    for other in (replace(own, public_key=public_hex(STRANGER)), replace(own, public_key="no key")):
        assert says(Forger(other).audit(), "belongs to its key")


# Restores.


def test_a_proven_restore_costs_nothing_but_excuses_nothing():
    forger = Forger().charge(CHEAP).restore(proven=True)
    result = forger.audit()
    assert (result.findings, result.restored, result.unproven) == ([], 1, False)
    assert result.epsilon == epsilon_of(int(forger.entries[0].rdp_charge), 3.4, 1e-5)
    lost = SignedHead.sign(KEY, forger.genesis.ledger_id, 2, "e" * 64)
    assert says(forger.audit(receipts=[lost]), "another history")


@pytest.mark.parametrize("share", [0, 0.5, 0.999999])
def test_an_unproven_restore_must_charge_all_that_is_left(share):
    forger = Forger().charge(CHEAP)
    forger.restore(proven=False, charge=str(int(int(forger.left) * share)))
    result = forger.audit()
    assert says(result, "must be at least")
    assert result.epsilon == pytest.approx(8.0)  # the rest counts as spent whatever the entry says


def test_receipts_of_the_lost_tail_are_accepted_where_the_rest_was_charged():
    forger = Forger().charge(CHEAP)
    forger.restore(proven=False, charge=forger.left)
    name = forger.genesis.ledger_id
    lost = [SignedHead.sign(KEY, name, seq, "e" * 64) for seq in (2, 3, 40)]
    result = forger.audit(receipts=lost)
    assert (result.findings, result.unproven, result.epsilon) == ([], True, pytest.approx(8.0))
    before = SignedHead.sign(KEY, name, 1, "e" * 64)  # the restore lost nothing that far back
    assert says(forger.audit(receipts=[before]), "another history")
    forged = SignedHead.sign(STRANGER, name, 40, "e" * 64)
    assert says(forger.audit(receipts=[forged]), "proves nothing")
    without = Forger().charge(CHEAP)
    assert says(without.audit(receipts=lost), "entries are missing")


def test_after_an_unproven_restore_nothing_more_can_be_spent():
    forger = Forger().charge(CHEAP)
    forger.restore(proven=False, charge=forger.left).charge(request(2, sigma=20.0))
    assert says(forger.audit(), "spends more than the budget")


# Plans.


def test_a_plan_sets_aside_what_its_charges_cost():
    forger = Forger().admit(CHEAP, 3).charge(CHEAP).charge(request(2, sigma=20.0)).close(CHEAP)
    assert forger.audit().findings == []


@pytest.mark.parametrize("units", ["0", "1", "-1", "-100000000000000", "many", 1, None])
def test_a_plan_that_sets_too_little_aside_is_found(units):
    forger = Forger().admit(CHEAP, 3, units=units)
    if units is None:
        price = int(json.loads(forger.entries[0].mechanism_text)["units"])
        forger = Forger().admit(CHEAP, 3, units=str(int(0.999 * price)))
    assert forger.audit().findings


def test_a_plan_cannot_make_room_by_setting_less_than_nothing_aside():
    forger = Forger().admit(CHEAP, -(10**6), units=str(-(10**14)))
    number = 0
    while int(forger.entries[-1].rdp_total) <= int(forger.genesis.rdp_budget):
        number += 1
        forger.charge(request(number, sigma=2.0, plan_hash="other"))
    assert says(forger.audit(), "spends more than the budget")


def test_a_plan_admitted_twice_or_after_its_end_or_closed_without_one_is_found():
    assert says(Forger().admit(CHEAP, 1).admit(CHEAP, 1).audit(), "second time")
    assert says(Forger().admit(CHEAP, 1).close(CHEAP).admit(CHEAP, 1).audit(), "second time")
    assert says(Forger().admit(CHEAP, 1).restore(proven=True).admit(CHEAP, 1).audit(), "second time")
    assert says(Forger().close(CHEAP).audit(), "not open")
    assert says(Forger().admit(CHEAP, 1).close(CHEAP).close(CHEAP).audit(), "not open")


def test_admitting_more_than_is_left_is_found():
    price = 0
    forger = Forger().charge(request(1, sigma=2.0))
    price = int(forger.entries[0].rdp_charge)
    fits = (int(forger.genesis.rdp_budget) - price) // price
    item = request(2, sigma=2.0, plan_hash="planned")
    assert Forger().charge(request(1, sigma=2.0)).admit(item, fits).audit().findings == []
    assert says(Forger().charge(request(1, sigma=2.0)).admit(item, fits + 1).audit(), "sets more aside")


def test_spending_what_is_set_aside_for_another_plan_is_found():
    item, other = request(1, sigma=2.0), request(2, sigma=2.0, plan_hash="other")
    price = int(Forger().charge(item).entries[0].rdp_charge)
    fits = int(genesis().rdp_budget) // price
    assert Forger().admit(item, fits - 1).charge(other).audit().findings == []
    assert Forger().admit(item, fits).charge(item).audit().findings == []
    assert says(Forger().admit(item, fits).charge(other).audit(), "spends more than the budget")
    assert Forger().admit(item, fits).close(item).charge(other).audit().findings == []  # given back


# Charges.


def of_round(number, **changes):
    return request(number, sigma=20.0, **changes)


@pytest.mark.parametrize(
    "other", [{"model_in_hash": "n" * 64}, {"plan_hash": "q" * 64}, {"releases": ("delta", "loads")}]
)
@pytest.mark.parametrize("ended", ["RESERVED", "COMMITTED"])
def test_a_round_that_is_charged_twice_is_found(other, ended):
    again = replace(of_round(1, plan_hash="r" * 64), **other)
    if "releases" in other:
        again = replace(again, parts=(("delta", 30.0), ("loads", 30.0)))
    forger = Forger().charge(of_round(1))
    if ended == "COMMITTED":
        forger.charge(of_round(1), "COMMITTED")
    result = forger.charge(again).audit()
    assert says(result, f"entry {len(forger.entries)}", "in round 1 once more")


def test_what_may_be_in_one_round_is_not_found_twice():
    forger = Forger().charge(of_round(1)).charge(of_round(1), "ABANDONED").charge(of_round(1, model_in_hash="n" * 64))
    forger.charge(of_round(1, kind="choose", releases=("choice",))).charge(of_round(1, run_id="8"))
    assert forger.charge(of_round(2)).audit().findings == []


def test_more_than_a_plan_was_admitted_with_is_found():
    forger = Forger().admit(of_round(1), 2).charge(of_round(1)).charge(of_round(2))
    assert forger.audit().findings == []
    assert says(forger.charge(of_round(3)).audit(), "entry 4", "one charge more than its plan was admitted with")


def test_what_a_plan_was_not_admitted_with_is_found():
    forger = Forger().admit(of_round(1), 2).charge(replace(of_round(1), clip=2.0))
    assert says(forger.audit(), "entry 2", "not among those that its plan was admitted with")


def test_a_charge_after_the_end_of_its_plan_is_found():
    forger = Forger().admit(of_round(1), 2).charge(of_round(1)).close(of_round(1))
    assert forger.audit().findings == []
    assert says(forger.charge(of_round(2)).audit(), "entry 4", "charges a plan that was closed")


def test_an_abandoned_charge_stays_spent():
    forger = Forger().charge(CHEAP).charge(CHEAP, "ABANDONED")
    result = forger.audit()
    assert (result.findings, result.abandoned, result.pending) == ([], 1, 0)
    assert result.epsilon == epsilon_of(int(forger.entries[0].rdp_charge), 3.4, 1e-5) > 0
    back = Forger().charge(CHEAP)
    back.charge(CHEAP, "ABANDONED", charge=str(-int(back.entries[0].rdp_charge)))
    assert says(back.audit(), "must be at least 0")
    assert back.audit().epsilon == result.epsilon


@pytest.mark.parametrize(
    ("first", "then"),
    [
        (["RESERVED"], "RESERVED"),
        (["RESERVED", "COMMITTED"], "COMMITTED"),
        (["RESERVED", "COMMITTED"], "ABANDONED"),
        (["RESERVED", "COMMITTED"], "RESERVED"),
        (["RESERVED", "ABANDONED"], "COMMITTED"),
        (["RESERVED", "ABANDONED"], "RESERVED"),
        ([], "ABANDONED"),
        ([], "COMMITTED"),
        (["RESERVED"], "DONE"),
        (["RESERVED"], ""),
    ],
)
def test_states_follow_their_order(first, then):
    forger = Forger()
    for state in first:
        forger.charge(CHEAP, state)
    assert forger.audit().findings == []
    assert says(forger.charge(CHEAP, then).audit(), "state")


@pytest.mark.parametrize("state", ["COMMITTED", "ABANDONED"])
@pytest.mark.parametrize(
    "changes",
    [
        {"mechanism": request(sigma=2.0).mechanism_json()},
        {"run_id": "8"},
        {"round": 2},
        {"plan_hash": "q" * 64},
        {"model_in_hash": "n" * 64},
        {"releases": '["delta","loss"]'},
        {"rng": "seeded"},
    ],
)
def test_a_charge_ends_as_it_began(state, changes):
    forger = Forger().charge(CHEAP).charge(CHEAP, state, **changes)
    assert says(forger.audit(), "than it began with")


@pytest.mark.parametrize("charge", ["inf", " 5", "1_0", "+5", "5.0", "nan", "", "٣"])
def test_amounts_are_spelled_one_way(charge):
    forger = Forger().charge(CHEAP).charge(CHEAP, "COMMITTED")
    entries = [forger.entries[0], replace(forger.entries[1], rdp_charge=charge)]
    assert findings(forger.genesis, entries)


@pytest.mark.parametrize(
    "changes", [{"version": 0}, {"version": 99}, {"ledger_id": "0" * 32}, {"rdp_budget": "1"}, {"seq": 7}]
)
def test_every_entry_belongs_to_its_ledger(changes):
    forger = Forger().charge(CHEAP)
    assert findings(forger.genesis, rehash(forger.genesis, [replace(forger.entries[0], **changes)]))


def test_a_gap_in_the_numbers_is_found_even_where_the_chain_is_whole():
    forger = Forger().charge(CHEAP).charge(CHEAP, "COMMITTED").charge(request(2, sigma=20.0))
    entries = [*forger.entries[:2], replace(forger.entries[2], seq=4)]
    assert says(audit_history(Lines(forger.genesis, entries)), "one is missing or moved")


def test_a_total_that_does_not_add_up_is_found():
    forger = Forger().charge(CHEAP).charge(request(2, sigma=20.0))
    entries = [forger.entries[0], replace(forger.entries[1], rdp_total=forger.entries[0].rdp_total)]
    assert says(audit_history(Lines(forger.genesis, entries)), "total")


# What cannot be read.


FIRST = genesis()


def _line(**changes):
    return json.dumps(
        json.loads(Forger(FIRST).charge(CHEAP).entries[0].line) | changes, sort_keys=True, separators=(",", ":")
    )


MALFORMED = {
    "nothing": b"",
    "no JSON": b"entry",
    "a number": b"1",
    "null": b"null",
    "a list": b"[]",
    "an empty object": b"{}",
    "no UTF-8": b"\xff\xfe",
    "a deep list": b"[" * 200_000,
    "a deep object": b'{"a":' * 200_000,
    "a huge number": b"9" * 10_000,
    "a field less": json.dumps({k: v for k, v in json.loads(_line()).items() if k != "rng"}, sort_keys=True).encode(),
    "a field more": _line(zzz=1).encode(),
    "something after it": _line().encode() + b"{}",
    "space after it": _line().encode() + b" ",
    "space before it": b" " + _line().encode(),
    "a byte order mark": b"\xef\xbb\xbf" + _line().encode(),
    "fields in another order": json.dumps(dict(reversed(json.loads(_line()).items()))).encode(),
    **{
        f"{name} as {text}": _line(**{name: value}).encode()
        for name in ("seq", "version", "round", "rdp_charge", "rdp_total", "charge_id", "state", "mechanism", "run_id")
        for text, value in {
            "NaN": float("nan"), "infinity": float("inf"), "a fraction": 1.0, "true": True, "null": None, "a list": [],
            "an object": {}, "a deep list": json.loads("[" * 500 + "]" * 500), "a lone surrogate": "\ud800",
            "a huge number": 10**4000, "a negative number": -1,
        }.items()
        # A number or a text like any other, in fields that only say what was asked for.
        if (name, text) not in {
            ("round", "a huge number"), ("round", "a negative number"), ("charge_id", "a lone surrogate"),
            ("run_id", "a lone surrogate"),
        }
    },
}  # fmt: skip


@pytest.mark.parametrize("name", MALFORMED)
def test_a_malformed_line_is_a_finding_even_where_the_owner_signed_it(name):
    assert audit_history(sealed(FIRST, [MALFORMED[name]])).findings, name


def test_a_well_formed_line_that_the_owner_signed_is_none():
    assert audit_history(sealed(FIRST, [_line().encode()])).findings == []
    for changes in ({"round": -1}, {"round": 10**4000}, {"run_id": "\ud800"}):
        assert audit_history(sealed(FIRST, [_line(**changes).encode()])).findings == []


@pytest.mark.parametrize("state", ["ADMITTED", "CLOSED", "ROTATED", "RESTORED", "MIGRATED", "RESERVED", "COMMITTED"])
@pytest.mark.parametrize(
    "mechanism", ["", "null", "[]", "{}", '{"kind":1}', "[" * 100_000, '{"units":1e999,"charges":1e999}', '"x"']
)
def test_a_malformed_mechanism_never_stops_the_audit(state, mechanism):
    result = Forger().charge(CHEAP).add(state, "0" * 64, mechanism).audit()
    assert result.findings or state == "MIGRATED"


GENESIS_CHANGES = [
    {"epsilon": "nan"}, {"epsilon": "inf"}, {"epsilon": "0"}, {"epsilon": "-1"}, {"epsilon": 8}, {"epsilon": 8.0},
    {"epsilon": None}, {"epsilon": "1e999"}, {"delta": "0"}, {"delta": "1"}, {"delta": "nan"}, {"order": "1"},
    {"order": "0"}, {"order": "inf"}, {"order": "nan"}, {"rdp_budget": "0"}, {"rdp_budget": "-5"}, {"rdp_budget": "x"},
    {"rdp_budget": 5}, {"epsilon": "1" + 308 * "0"}, {"rdp_budget": "9" * 5000}, {"version": 0}, {"version": 99},
    {"version": "2"},
    {"version": True}, {"version": 2.0}, {"mode": "other"}, {"mode": None}, {"dataset_id": []}, {"dataset_id": 1.5},
    {"dataset_id": "\ud800"}, {"dataset_id": json.loads("[" * 500 + "]" * 500)}, {"public_key": None},
    {"ledger_id": 7}, {"extra": "field"},
]  # fmt: skip


@pytest.mark.parametrize("changes", GENESIS_CHANGES, ids=lambda c: next(f"{k}={v!r:.20}" for k, v in c.items()))
def test_a_malformed_genesis_is_refused(changes):
    document = json.dumps(asdict(genesis()) | changes, sort_keys=True, separators=(",", ":"))
    with pytest.raises(BadInputError, match="genesis cannot be read"):
        Genesis.parse(document)


def test_findings_show_what_others_wrote_short_and_without_control_characters():
    result = Forger().charge(CHEAP, state="\x1b[2J" + "x" * 100_000).audit()
    assert max(map(len, result.findings)) < 200
    assert all(finding.isprintable() for finding in result.findings)


def test_findings_are_counted_beyond_the_first_fifty():
    forger = Forger()
    for number in range(80):
        forger.charge(CHEAP, "COMMITTED", charge_id=f"{number:064x}")
    assert len(forger.audit().findings) == 51
    assert forger.audit().findings[-1] == "and 30 more"


def test_no_mutation_makes_the_audit_fail_in_another_way(life, tmp_path):
    """700 seeded mutations of values, names and types anywhere; each is found, as the head is the owner's own.

    Those that leave the JSON document as it was are not tried, so nothing can be found by chance.
    """
    lines = life.export.read_bytes().splitlines()
    rng = random.Random(7)
    junk = [None, True, -1, 0, 1.5, 10**30, float("nan"), float("-inf"), "", "inf", "\ud800", [], {}, [[[]]], "9" * 400]
    tried = found = refused = 0
    for _ in range(700):
        index = rng.choice([0, len(lines) - 1, *(rng.randrange(1, len(lines) - 1) for _ in range(6))])
        document = json.loads(lines[index])
        name = rng.choice(sorted(document))
        kind = rng.randrange(5)
        inner = None
        if kind == 0 and name == "mechanism":
            inner = json.loads(document[name])
            inner[rng.choice(sorted(inner))] = rng.choice(junk)
            document[name] = json.dumps(inner)
        elif kind == 1:
            del document[name]
        elif kind == 2:
            document[f"{name}2"] = document.pop(name)
        elif kind == 3 and isinstance(document[name], str) and document[name]:
            at = rng.randrange(len(document[name]))
            document[name] = document[name][:at] + chr(rng.randrange(1, 0xD7FF)) + document[name][at + 1 :]
        else:
            document[name] = rng.choice(junk)
        if document == json.loads(lines[index]):
            continue
        tried += 1
        mutated = json.dumps(document, sort_keys=True, separators=(",", ":")).encode()
        path = tmp_path / "export"
        path.write_bytes(b"\n".join([*lines[:index], mutated, *lines[index + 1 :]]) + b"\n")
        try:
            history = LedgerExport(path)
            result = audit_history(history)
        except BadInputError:
            refused += 1
            continue
        found += bool(result.findings)
        with contextlib.suppress(BadInputError):  # it sums up what is stated, or says that it cannot
            budget_of(history)
    assert tried > 650
    assert found + refused == tried
    assert min(found, refused) > 35


def test_mutations_that_the_owner_vouches_for_never_make_the_audit_fail_in_another_way(life):
    """1000 seeded mutations of one entry with chain and head made good again: whatever is found, nothing is raised."""
    lines = life.export.read_bytes().splitlines()
    first = Genesis.parse(lines[0])
    entries = [json.loads(line) for line in lines[1:-1]][:12] + [json.loads(line) for line in lines[42:44]]
    rng = random.Random(8)
    junk = [None, True, -1, 0, 1.5, 10**30, float("nan"), float("inf"), "", "inf", [], {}, "9" * 400, "RESTORED"]
    for _ in range(1000):
        documents = [dict(document) for document in entries]
        target = rng.choice(documents)
        name = rng.choice(sorted(target))
        if name == "mechanism":
            inner = json.loads(target[name])
            inner[rng.choice(sorted(inner))] = rng.choice(junk)
            target[name] = json.dumps(inner)
        else:
            target[name] = rng.choice(junk)
        raw, prev = [], first.hash
        for document in documents:
            document["prev_hash"] = prev if name != "prev_hash" or document is not target else target["prev_hash"]
            raw.append(json.dumps(document, sort_keys=True, separators=(",", ":")).encode())
            prev = sha256(raw[-1])
        history = sealed(first, raw)
        audit_history(history)
        with contextlib.suppress(BadInputError):
            budget_of(history)


def test_canonical_lines_survive_reading(life):
    for line in life.export.read_bytes().splitlines()[1:-1]:
        assert Entry.parse(line).line == line == canonical_json(json.loads(line))
