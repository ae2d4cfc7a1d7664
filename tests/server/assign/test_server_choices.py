"""Assignment by affinity: choices are charged and released once, hostile ones change nothing, a run is repeatable."""

from __future__ import annotations

import json

import pytest
import torch
from server_samples import be_the_server, describe, key_of, make_plan

from conclave.audit.run import audit_run
from conclave.base.canonical import sha256
from conclave.base.errors import BadInputError
from conclave.privacy.accounting.filter import fixed_order
from conclave.privacy.accounting.mechanisms import ExponentialChoice
from conclave.privacy.accounting.prices import charge_units
from conclave.privacy.ledger import SignedHead
from conclave.privacy.ledger.entry import Entry
from conclave.privacy.ledger.reading.history import open_history
from conclave.privacy.ledger.reading.verification import audit_history
from conclave.protocol.codec import encode
from conclave.protocol.messages import ChooseReply, ProtocolError, Refusal
from conclave.protocol.tensor_array import pack
from conclave.server.assign.choices import Choices
from conclave.server.replies.receipts import ReceiptBook
from conclave.server.replies.validation import DroppedError
from conclave.server.run_directory import RunDirectory
from conclave.server.scenario import read_scenario
from conclave.simulations.estimate import estimate_simulated
from conclave.simulations.shipped import find
from conclave.simulations.simulate import simulate

AFFINITY = {"epsilon": 0.5, "every": 2, "experts": 3}
PLAN = make_plan(affinity=AFFINITY)
CHANGES = {
    "federation.rounds": 5,
    "federation.assignment": "affinity",
    "affinity": {"epsilon": 0.3, "every": 2},
    "partition.nodes": 4,
    "model.width": 8,
}


SENT = sha256(b"the tensors that went with the question")


def charge_of(number, round_number):
    """As the node works it out: run, round, ledger, plan, what was sent, kind."""
    named = ["1", round_number, describe(number).ledger_id, PLAN.hash, SENT, "choose"]
    return sha256(json.dumps(named, separators=(",", ":")).encode())


def answer(number=1, ids=(4, 0, 2), seq=7, round_number=3, **tensors):
    receipt = SignedHead.sign(key_of(number), describe(number).ledger_id, seq, f"{seq:064x}")
    body = tensors or {"choice/0": torch.tensor(ids, dtype=torch.float32)}
    return encode(ChooseReply(charge_id=charge_of(number, round_number), receipt=receipt), pack(body))


def take(choices, content, number=1, round_number=3):
    choices.take(round_number, describe(number), "1", SENT, content, ReceiptBook())


def test_what_a_run_of_an_earlier_version_kept_is_known(tmp_path):
    """Without it the rounds until the next choice would go on as if nobody had chosen."""
    node = describe(1).fingerprint
    (tmp_path / "wishes.json").write_text(json.dumps({"round": 3, "wishes": {node: [[0, 2, 4]]}}))
    choices = Choices(PLAN, RunDirectory(tmp_path).choices)
    assert (choices.round, choices.assign({node: {0: (0, 1, 3)}}, 1)) == (3, {node: {0: (0, 2, 4)}})
    choices.finish(5)
    assert Choices(PLAN, RunDirectory(tmp_path).choices).round == 5


def test_an_honest_choice_becomes_the_assignment_and_outlives_a_restart(tmp_path):
    be_the_server()
    path = tmp_path / "choices.json"
    choices = Choices(PLAN, path)
    assert [number for number in range(1, 8) if choices.due(number)] == [3, 5, 7]
    take(choices, answer())
    choices.finish(3)
    node, other = describe(1).fingerprint, describe(2).fingerprint
    before = {node: {0: (0, 1, 2)}, other: {0: (1, 3, 5)}}
    for known in (choices, Choices(PLAN, path)):
        assert known.assign(before, 1) == {node: {0: (0, 2, 4)}, other: {0: (1, 3, 5)}}
        assert not known.due(3)
        assert known.due(5)


HOSTILE = {
    "an expert twice": lambda: answer(round_number=5, ids=(1, 1, 2)),
    "an expert that does not exist": lambda: answer(round_number=5, ids=(1, 6, 2)),
    "a negative one": lambda: answer(round_number=5, ids=(1, -1, 2)),
    "half an expert": lambda: answer(round_number=5, ids=(1, 0.5, 2)),
    "nan": lambda: answer(round_number=5, ids=(1, float("nan"), 2)),
    "too few": lambda: answer(round_number=5, ids=(1, 2)),
    "too many": lambda: answer(round_number=5, ids=(1, 2, 3, 4)),
    "another layer": lambda: answer(round_number=5, **{"choice/1": torch.zeros(3)}),
    "scores beside it": lambda: answer(
        round_number=5, **{"choice/0": torch.tensor([1.0, 2.0, 3.0]), "scores": torch.zeros(6)}
    ),
    "the receipt of another node": lambda: answer(round_number=5, number=2),
    "the charge of an earlier round": lambda: answer(round_number=3),
    "a refusal": lambda: encode(Refusal(code="not-allowed")),
}


@pytest.mark.parametrize("content", HOSTILE.values(), ids=HOSTILE.keys())
def test_a_bad_choice_leaves_what_was_wished_before(content):
    be_the_server()
    choices = Choices(PLAN)
    take(choices, answer())
    with pytest.raises((DroppedError, ProtocolError)):
        take(choices, content(), round_number=5)
    node = describe(1).fingerprint
    assert choices.assign({node: {0: (0, 1, 3)}}, 1) == {node: {0: (0, 2, 4)}}


def test_a_receipt_that_goes_back_or_is_not_signed_is_refused():
    choices, book = Choices(PLAN), ReceiptBook()
    choices.take(3, describe(1), "1", SENT, answer(), book)
    forged = SignedHead.sign(key_of(2), describe(1).ledger_id, 9, f"{9:064x}")
    for receipt in (SignedHead.sign(key_of(1), describe(1).ledger_id, 5, f"{5:064x}"), forged):
        reply = ChooseReply(charge_id=charge_of(1, 5), receipt=receipt)
        content = encode(reply, pack({"choice/0": torch.arange(3.0)}))
        with pytest.raises(DroppedError, match="its receipt was refused"):
            choices.take(5, describe(1), "1", SENT, content, book)


def say(number, charge_id, seq, ids=(1, 3, 5)):
    receipt = SignedHead.sign(key_of(number), describe(number).ledger_id, seq, f"{seq:064x}")
    return encode(ChooseReply(charge_id=charge_id, receipt=receipt), pack({"choice/0": torch.tensor(ids).float()}))


REPLAYED = {
    "its answer to an earlier round": lambda: answer(),
    "the earlier answer's receipt, under the charge of this round": lambda: say(1, charge_of(1, 5), seq=7),
    "a training's receipt, under the charge of this round": lambda: say(1, charge_of(1, 5), seq=8),
    "the earlier charge, with a receipt of its own": lambda: say(1, charge_of(1, 3), seq=9),
    "another node's answer": lambda: answer(2, round_number=5),
    "its own receipt, under another node's charge": lambda: say(1, charge_of(2, 5), seq=9),
}


@pytest.mark.parametrize("replayed", REPLAYED.values(), ids=REPLAYED.keys())
def test_one_charge_pays_for_one_choice(replayed):
    """A node that answers with what it was charged for before has not been charged for this choice."""
    be_the_server()
    choices, book = Choices(PLAN), ReceiptBook()
    choices.take(3, describe(1), "1", SENT, answer(), book)
    trained = SignedHead.sign(key_of(1), describe(1).ledger_id, 8, f"{8:064x}")
    known = kept_of(book)[0]
    book.keep(known.model_copy(update={"charge_id": "c" * 64, "receipt": trained, "kind": "train"}))
    before, node = kept_of(book), describe(1).fingerprint
    with pytest.raises(DroppedError):
        choices.take(5, describe(1), "1", SENT, replayed(), book)
    assert choices.assign({node: {0: (0, 1, 3)}}, 1) == {node: {0: (0, 2, 4)}}
    assert kept_of(book) == before


def test_a_question_that_is_put_again_takes_the_stored_answer_and_no_second_receipt_for_its_charge():
    be_the_server()
    choices, book = Choices(PLAN), ReceiptBook()
    choices.take(3, describe(1), "1", SENT, answer(), book)
    choices.take(3, describe(1), "1", SENT, answer(), book)
    assert [kept.receipt.seq for kept in kept_of(book)] == [7]
    with pytest.raises(DroppedError, match="its charge has another receipt"):
        choices.take(3, describe(1), "1", SENT, answer(seq=9), book)


@pytest.mark.parametrize("kind", ["an expert twice", "too few", "scores beside it"])
def test_what_the_node_was_charged_for_has_its_receipt_kept(kind):
    be_the_server()
    choices, book = Choices(PLAN), ReceiptBook()
    with pytest.raises(DroppedError):
        choices.take(5, describe(1), "1", SENT, HOSTILE[kind](), book)
    assert [kept.kind for kept in kept_of(book)] == ["choose"]


def kept_of(book):
    return sorted(book._known, key=lambda kept: kept.receipt.seq)


def test_a_damaged_file_is_named(tmp_path):
    path = tmp_path / "choices.json"
    choices = ("null", "3", "[0]", "[[0, 0]]", "[[0], [1]]", "[[99]]", '[["a"]]', "[[{}]]", "[3]")
    for text in (
        '{"round": 3}',
        "[" * 100_000,
        *(f'{{"round": 3, "choices": {{"n": {choice}}}}}' for choice in choices),
    ):
        path.write_text(text)
        with pytest.raises(BadInputError, match=r"choices\.json: damaged"):
            Choices(PLAN, path)
    path.write_text('{"round": 3, "choices": {"n": [[0, 2, 1]]}}')
    assert Choices(PLAN, path).round == 3


def entries_of(path):
    return [Entry.parse(line) for line in open_history(path).lines()]


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    scenario = read_scenario(find("digits"), CHANGES)
    run = RunDirectory.create(scenario, tmp_path_factory.mktemp("affinity") / "run")
    return scenario, run, simulate(scenario, run)


def test_choices_are_charged_before_training_within_the_same_budget(finished):
    scenario, run, summary = finished
    plan, order = scenario.plan(), fixed_order(8.0, 1e-5)
    assert 7.9 < summary.epsilon <= 8.0
    without = read_scenario(find("digits"), {**CHANGES, "federation.assignment": "balanced", "affinity": None}).plan()
    assert plan.noise_multiplier > without.noise_multiplier  # training pays for what choosing costs
    price = charge_units(ExponentialChoice(epsilon=0.3, choices=4), order)
    for path in run.ledgers:
        entries = entries_of(path)
        chosen = [entry for entry in entries if entry.state == "RESERVED" and entry.releases == '["choice"]']
        assert [entry.round for entry in chosen] == [3, 5]
        assert [int(entry.rdp_charge) for entry in chosen] == [price, price]
        assert not any("parts" in entry.mechanism_text for entry in entries)  # one release a sample
        admitted = json.loads(entries[0].mechanism_text)
        assert admitted["also"] == [{"charges": 2, "mechanism": '{"choices":4,"epsilon":"0.3","kind":"exponential"}'}]
        assert int(admitted["units"]) == int(entries[-1].rdp_total)  # what was set aside was spent, to the last unit
    estimate = estimate_simulated(scenario)
    assert estimate.epsilon == pytest.approx(summary.epsilon, rel=1e-6)
    budget = int(open_history(run.ledgers[0]).genesis.rdp_budget)
    assert estimate.choices == 2
    assert estimate.choice_share == pytest.approx(2 * price / budget, rel=1e-3)


def test_the_run_is_audited_in_both_directions(finished):
    _, run, _ = finished
    audit = audit_run(run)
    assert (audit.verdict, audit.findings) == ("NOT_REFUTED", [])
    assert audit.receipts == audit.matched == 4 * (5 + 2)


def test_an_admission_that_sets_less_aside_than_its_choices_cost_is_found(finished, monkeypatch):
    _, run, _ = finished
    history = open_history(run.ledgers[0])
    lines = list(history.lines())
    document = json.loads(lines[0])
    admitted = json.loads(document["mechanism"])
    admitted["also"][0]["charges"] = 20
    document["mechanism"] = json.dumps(admitted, separators=(",", ":"), sort_keys=True)

    class Changed:
        genesis, head, rotations = history.genesis, history.head, getattr(history, "rotations", ())

        def __getattr__(self, name):
            return getattr(history, name)

        def lines(self):
            return iter([json.dumps(document, separators=(",", ":"), sort_keys=True).encode(), *lines[1:]])

    findings = audit_history(Changed()).findings
    assert any("aside, must be at least" in finding for finding in findings)


def test_the_same_run_again_is_the_same(finished, tmp_path):
    scenario, run, _ = finished
    again = RunDirectory.create(scenario, tmp_path / "run")
    simulate(scenario, again)
    for name in ("model/model.safetensors", "choices.json"):
        assert (again.path / name).read_bytes() == (run.path / name).read_bytes()


CHOOSE = {"affinity": {"epsilon": 0.1, "every": 5}}


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        (
            {"federation.assignment": "affinity"},
            r"federation\.assignment is affinity, must be affinity with \[affinity\]",
        ),
        ({"affinity": {"epsilon": 0.1, "every": 5}}, r"federation\.assignment is balanced, must be affinity"),
        (
            {
                "federation.assignment": "affinity",
                "affinity": {"epsilon": 0.1, "every": 5},
                "privacy.mechanism": "none",
            },
            r"privacy\.mechanism is none, must be gaussian with \[affinity\]",
        ),
        ({"federation.assignment": "affinity", "affinity": {"epsilon": 0.0, "every": 5}}, r"affinity\.epsilon is 0\.0"),
    ],
)
def test_contradictions_are_refused(changes, sentence):
    with pytest.raises(BadInputError, match=sentence):
        read_scenario(find("digits"), changes)


def test_choices_that_cost_more_than_the_budget_are_refused():
    with pytest.raises(BadInputError, match="the planned choices alone cost epsilon"):
        read_scenario(find("digits"), {**CHANGES, "affinity.epsilon": 9.0, "affinity.every": 1}).plan()
