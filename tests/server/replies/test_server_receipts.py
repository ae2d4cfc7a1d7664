"""Receipts: kept, sent back, and a reply without a good one does not count."""

from __future__ import annotations

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from server_samples import SmallFederation, ask, delta_for, describe, key_of, receipt_for, train_reply

from conclave.base.errors import BadInputError
from conclave.privacy.ledger import KeyRotation, SignedHead
from conclave.protocol.codec import decode
from conclave.protocol.messages import Description, TrainRequest
from conclave.server.replies.receipts import KeptReceipt, ReceiptBook, read_receipts

NODE = describe(1)


def head(seq: int, text: str = "a", key: Ed25519PrivateKey | None = None, ledger: str = NODE.ledger_id) -> SignedHead:
    return SignedHead.sign(key or key_of(1), ledger, seq, text * 64)


def kept(seq: int, round_number: int = 1, **changes) -> KeptReceipt:
    values = {
        "round": round_number,
        "node": NODE.fingerprint,
        "run_id": "1",
        "plan_hash": "0" * 64,
        "charge_id": f"{seq:064x}",
        "output_hash": "1" * 64,
        "signing_key": NODE.signing_key,
        "receipt": head(seq),
    }
    return KeptReceipt(**(values | changes))


def test_a_receipt_must_continue_what_is_known():
    book = ReceiptBook()
    assert book.why_refused(NODE, head(4)) is None
    assert book.why_refused(NODE, head(4, key=key_of(2))) == "it is not signed with the node's key"
    assert book.why_refused(NODE, head(4, key=key_of(2), ledger=describe(2).ledger_id)) == "it is of another ledger"
    book.keep(kept(4))
    assert book.why_refused(NODE, head(4)) is None  # a stored reply, delivered again
    assert book.why_refused(NODE, head(4, "b")) == "it contradicts an earlier one"
    assert book.why_refused(NODE, head(3)) == "it is older than one that was sent before"
    assert book.why_refused(NODE, head(6)) is None
    assert book.why_refused(describe(2), head(1, key=key_of(2), ledger=describe(2).ledger_id)) is None


def test_after_a_rotation_the_new_key_counts():
    new = Ed25519PrivateKey.from_private_bytes(b"n" * 32)
    rotation = KeyRotation.sign(NODE.ledger_id, key_of(1), new)
    rotated = Description.model_validate(NODE.model_dump() | {"rotations": (rotation,)})
    assert rotated.fingerprint == NODE.fingerprint
    assert ReceiptBook().why_refused(rotated, head(4, key=new)) is None
    assert ReceiptBook().why_refused(rotated, head(4)) == "it is not signed with the node's key"
    stranger = KeyRotation.sign(NODE.ledger_id, key_of(2), new)
    for bad in ((stranger,), (rotation, rotation), (rotation.model_copy(update={"by_old": "0" * 128}),)):
        with pytest.raises(ValueError, match="both keys did not sign"):
            Description.model_validate(NODE.model_dump() | {"rotations": bad})


def test_receipts_are_read_however_their_file_was_copied(tmp_path):
    path = tmp_path / "receipts.jsonl"
    book = ReceiptBook(path)
    book.keep(kept(2))
    book.keep(kept(4, 2))
    book.save()
    whole = path.read_bytes()
    expected = list(read_receipts(path))
    for content in (whole.replace(b"\n", b"\r\n"), b"\xef\xbb\xbf" + whole, whole[:-1], whole + b"\n\n"):
        path.write_bytes(content)
        assert list(read_receipts(path)) == expected
    path.write_bytes(whole.replace(b"\n", b"\n\n", 1))
    with pytest.raises(BadInputError, match="line 2 is damaged"):
        list(read_receipts(path))
    path.write_bytes(whole.decode().encode("utf-16"))
    with pytest.raises(BadInputError, match="UTF-16"):
        list(read_receipts(path))


def test_the_file_only_grows_and_a_torn_last_line_is_dropped(tmp_path):
    path = tmp_path / "receipts.jsonl"
    book = ReceiptBook(path)
    book.keep(kept(2))
    book.save()
    book.keep(kept(4, 2))
    book.keep(kept(4, 2))
    assert len(list(read_receipts(path))) == 1  # not saved yet
    book.save()
    before = path.read_bytes()
    again = ReceiptBook(path)
    again.keep(kept(4, 2))  # a round that is run again brings the same receipts
    again.save()
    assert path.read_bytes() == before
    assert again.latest(NODE.fingerprint) == head(4)
    assert again.latest("f" * 16) is None
    path.write_bytes(before + before[:100])
    with pytest.raises(BadInputError, match="line 3 is cut short"):
        list(read_receipts(path))
    assert ReceiptBook(path).latest(NODE.fingerprint) == head(4)
    assert path.read_bytes() == before
    path.write_bytes(b"{}\n" + before)
    with pytest.raises(BadInputError, match="line 1 is damaged"):
        ReceiptBook(path)


def test_a_node_is_sent_its_own_last_receipt():
    federation = SmallFederation(nodes=3)
    first = ask(federation)
    assert all(decode(request.content, TrainRequest).receipt is None for request in first)
    receipts = {request.metadata.dst_node_id: receipt_for(request) for request in first}
    outcome = federation.answer(
        1, [train_reply(r, delta_for(r, federation), receipts[r.metadata.dst_node_id]) for r in first]
    )
    assert outcome.replies.accepted == 3
    for request in ask(federation, 2):
        assert decode(request.content, TrainRequest).receipt == receipts[request.metadata.dst_node_id]


@pytest.mark.parametrize(
    "spoil",
    [
        lambda good: good.model_copy(update={"hash": "f" * 64}),
        lambda good: good.model_copy(update={"seq": good.seq + 1}),
        lambda good: good.model_copy(update={"ledger_id": "f" * 32}),
        lambda good: SignedHead.sign(key_of(9), good.ledger_id, good.seq, good.hash),
    ],
)
def test_a_reply_without_a_good_receipt_is_dropped(spoil):
    federation = SmallFederation(nodes=2)
    bad, good = ask(federation)
    replies = [
        train_reply(bad, delta_for(bad, federation, 9.0), spoil(receipt_for(bad))),
        train_reply(good, delta_for(good, federation)),
    ]
    outcome = federation.answer(1, replies)
    assert (outcome.replies.accepted, outcome.replies.dropped) == (1, 1)
    assert len(federation.books.receipts._known) == 1


def test_a_node_that_went_back_in_time_is_found_by_the_server():
    federation = SmallFederation(nodes=1)
    (request,) = ask(federation)
    far = receipt_for(request)
    outcome = federation.answer(1, [train_reply(request, delta_for(request, federation), far)])
    (again,) = ask(federation, 2)
    older = SignedHead.sign(key_of(1), far.ledger_id, far.seq - 1, "c" * 64)
    outcome = federation.answer(2, [train_reply(again, delta_for(again, federation), older)])
    assert (outcome.replies.accepted, outcome.replies.dropped) == (0, 1)


def test_a_receipt_is_kept_even_where_the_delta_is_not():
    federation = SmallFederation(nodes=1)
    (request,) = ask(federation)
    outcome = federation.answer(1, [train_reply(request, delta_for(request, federation, 1e6))])  # over the norm bound
    assert (outcome.replies.accepted, outcome.replies.dropped) == (0, 1)
    assert len(federation.books.receipts._known) == 1  # the node paid for it
