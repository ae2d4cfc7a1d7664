"""Messages: typed, versioned, hostile input refused with a code."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from conftest import make_config, make_reply
from flwr.app import Array, ArrayRecord, ConfigRecord, RecordDict
from flwr.common.serde import recorddict_from_proto, recorddict_to_proto
from flwr.supercore.inflatable.inflatable_object import get_all_nested_objects
from flwr.supercore.inflatable.inflatable_utils import inflate_object_from_contents
from plan_samples import plan, request
from safetensors.torch import save

from conclave.protocol.codec import body_of, decode, encode, tensors_of, unpack
from conclave.protocol.encodings import wire_form
from conclave.protocol.messages import (
    CODES,
    CloseRequest,
    Description,
    ProtocolError,
    Refusal,
    TrainReply,
    TrainRequest,
    fingerprint,
)
from conclave.protocol.plan import Plan
from conclave.protocol.tensor_array import pack

EXPECTED = {"shared/a": torch.Size([2, 3]), "router/0/4/score.weight": torch.Size([3])}


def test_documents_and_tensors_survive_the_wire():
    tensors = {name: torch.randn(shape) for name, shape in EXPECTED.items()}
    content = encode(request(), pack(tensors))
    assert decode(content, TrainRequest) == request()
    assert all(torch.equal(t, tensors[name]) for name, t in unpack(body_of(content), EXPECTED).items())


def test_plan_hash_changes_with_every_field():
    base = plan()
    others = [
        plan(rounds=11),
        plan(noise_multiplier=2.0000001),
        plan(training={"learning_rate": 0.25}),
        plan(privacy=base.privacy.model_copy(update={"clip": 2.0})),
        plan(model=make_config(hidden=16)),
        plan(traffic={"delta": "int8"}),
        plan(traffic={"delta": "bf16"}),
        plan(traffic={"model": "bf16"}),
    ]
    assert len({base.hash, *(other.hash for other in others)}) == 9
    assert plan(traffic={"delta": "fp32", "model": "fp32"}).hash == base.hash  # as before there was a choice
    assert Plan.model_validate_json(base.model_dump_json()).hash == base.hash


@pytest.mark.parametrize("run_id", ["", "a/b", "../a", "a b", "ü", "x" * 129, "a\n"])
def test_a_run_has_a_plain_name(run_id):
    """It begins the names of what a node keeps for the run, and ends with it."""
    with pytest.raises(ValueError, match="run_id"):
        CloseRequest(run_id=run_id)
    assert CloseRequest(run_id="12199022842089297454").run_id


@pytest.mark.parametrize(
    "wrong",
    [{"noise_multiplier": 1.1e9}, *({"privacy": change} for change in ({"sampling_rate": 9e-10}, {"clip": 9e-13}))],
)
def test_a_plan_asks_for_nothing_that_no_audit_or_arithmetic_can_carry(wrong):
    base = json.loads(plan().model_dump_json())
    for key, value in wrong.items():
        base[key] = base[key] | value if isinstance(value, dict) else value
    with pytest.raises(ValueError, match="should be"):
        Plan.model_validate_json(json.dumps(base))


@pytest.mark.parametrize("code", CODES)
def test_a_refusal_arrives_as_its_code_whatever_was_expected(code):
    for kind in (TrainReply, Description):
        with pytest.raises(ProtocolError) as caught:
            decode(encode(Refusal(code=code)), kind)
        assert caught.value.code == code


def document(text) -> RecordDict:
    return RecordDict({"document": ConfigRecord({"json": text})})


@pytest.mark.parametrize(
    "content",
    [
        RecordDict(),
        RecordDict({"document": ArrayRecord()}),
        RecordDict({"document": ConfigRecord({"other": "x"})}),
        document(7),
        document(""),
        document("[]"),
        document("{"),
        document('{"version": 2}'),
        document(json.dumps(make_reply().model_dump() | {"loss": 0.3})),  # an extra field is not declared
        document('{"version": 2, "code": "the record of Mr Smith"}'),  # free text is no code
        document("[" * 100_000),
    ],
)
def test_what_is_no_reply_is_a_bad_request(content):
    with pytest.raises(ProtocolError) as caught:
        decode(content, TrainReply)
    assert caught.value.code == "bad-request"


def test_another_version_is_named_as_such():
    for text in ({"version": 3, "novelty": True}, {"version": 99, "charge_id": "x"}):
        with pytest.raises(ProtocolError) as caught:
            decode(document(json.dumps(text)), TrainReply)
        assert caught.value.code == "version-mismatch"


def tensors(**changes) -> bytes:
    good = {name: torch.ones(shape) for name, shape in EXPECTED.items()}
    return save({name: t for name, t in (good | changes).items() if t is not None})


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"\x00" * 100,
        b"\xff" * 8 + b"{}",
        tensors()[:-4],
        tensors() + b"\x00" * 4,
        tensors(**{"shared/a": None}),
        tensors(**{"shared/b": torch.ones(1)}),
        tensors(**{"shared/a": torch.ones(3, 2)}),
        tensors(**{"shared/a": torch.ones(2, 3, dtype=torch.float64)}),
        tensors(**{"shared/a": torch.full((2, 3), float("nan"))}),
        tensors(**{"shared/a": torch.full((2, 3), float("inf"))}),
        b"\x00" * 1_000_000,
    ],
)
def test_tensors_that_are_not_exactly_as_expected_are_refused(body):
    with pytest.raises(ProtocolError) as caught:
        unpack(body, EXPECTED)
    assert caught.value.code == "bad-request"


def test_a_pickled_or_numpy_array_is_not_even_looked_at():
    content = encode(make_reply())
    for array in (Array(np.ones(3)), Array(dtype="uint8", shape=(1,), stype="pickle", data=b"x")):
        content["tensors"] = ArrayRecord({"body": array})
        with pytest.raises(ProtocolError):
            body_of(content)
    with pytest.raises(ProtocolError):
        body_of(encode(make_reply()))


def test_equal_tensors_give_equal_bytes_in_any_order():
    one = {name: torch.ones(shape) for name, shape in EXPECTED.items()}
    assert pack(one) == pack(dict(reversed(one.items())))


def test_the_fingerprint_follows_the_key():
    keys = ["00" * 32, "01" * 32]
    assert len({fingerprint(key) for key in keys}) == 2
    assert all(len(fingerprint(key)) == 16 for key in keys)


def test_shared_tensors_are_what_arrives_elsewhere():
    """In process the tensors themselves; over Flower's transport the packed bytes: the same message."""
    tensors = {name: torch.randn(shape) for name, shape in EXPECTED.items()}
    content = encode(request(), tensors)
    assert all(received is tensors[name] for name, received in tensors_of(content, EXPECTED).items())
    assert body_of(content) == pack(tensors)
    arrived = recorddict_from_proto(recorddict_to_proto(content))
    assert type(arrived["tensors"]["body"]) is Array
    assert all(torch.equal(t, tensors[name]) for name, t in tensors_of(arrived, EXPECTED).items())
    objects = get_all_nested_objects(content)
    sent = {key: value.deflate() for key, value in objects.items()}
    inflated = inflate_object_from_contents(content.object_id, sent)
    assert all(torch.equal(t, tensors[name]) for name, t in tensors_of(inflated, EXPECTED).items())


def test_shared_tensors_are_checked_like_any_others():
    for spoil in ({"shared/a": torch.ones(3, 2)}, {"extra": torch.ones(1)}, {"shared/a": torch.full((2, 3), np.nan)}):
        tensors = {name: torch.ones(shape) for name, shape in EXPECTED.items()} | spoil
        with pytest.raises(ProtocolError):
            tensors_of(encode(request(), tensors), EXPECTED)


ENCODED = dict.fromkeys(EXPECTED, "int8")


def packed(**changes) -> bytes:
    """Six values in two rows and three in one, sorted by name: the router's row comes first."""
    good = {
        "packed/int8": torch.arange(1, 10, dtype=torch.int8),
        "packed/int8-scales": torch.tensor([1.0, 0.5, 0.25], dtype=torch.bfloat16),
    }
    return save({name: t for name, t in (good | changes).items() if t is not None})


def test_int8_is_decoded_by_row():
    tensors = unpack(packed(), EXPECTED, ENCODED)
    assert tensors["router/0/4/score.weight"].tolist() == [1.0, 2.0, 3.0]
    assert tensors["shared/a"].tolist() == [[2.0, 2.5, 3.0], [1.75, 2.0, 2.25]]
    assert {tensor.dtype for tensor in tensors.values()} == {torch.float32}


def scales(*values) -> dict[str, torch.Tensor]:
    return {"packed/int8-scales": torch.tensor(values, dtype=torch.bfloat16)}


@pytest.mark.parametrize(
    "body",
    [
        tensors(),  # float32 where int8 was asked for
        packed(**{"packed/int8-scales": None}),
        packed(**{"packed/int8": None}),
        packed(**{"shared/a": torch.ones(2, 3)}),
        packed(**{"packed/int8": torch.ones(9)}),
        packed(**{"packed/int8": torch.ones(9, dtype=torch.uint8)}),
        packed(**{"packed/int8": torch.ones(10, dtype=torch.int8)}),
        packed(**{"packed/int8": torch.ones(3, 3, dtype=torch.int8)}),
        packed(**{"packed/int8": torch.full([9], -128, dtype=torch.int8)}),
        packed(**{"packed/int8-scales": torch.ones(3)}),
        packed(**scales(1.0, 1.0)),
        packed(**scales(1.0, float("nan"), 1.0)),
        packed(**scales(1.0, float("inf"), 1.0)),
        packed(**scales(1.0, -1.0, 1.0)),
        packed(**scales(1.0, 1e38, 1.0)),  # each finite, their products not
        packed(**scales(1.0, 1e20, 1.0)),  # a norm above 1e19
    ],
)
def test_int8_that_no_honest_node_sends_is_refused(body):
    with pytest.raises(ProtocolError) as caught:
        unpack(body, EXPECTED, ENCODED)
    assert caught.value.code == "bad-request"


def test_int8_where_float32_was_asked_for_is_refused():
    with pytest.raises(ProtocolError):
        unpack(packed(), EXPECTED)


def test_a_shared_bfloat16_model_is_what_arrives_elsewhere():
    """In process, packed, and after Flower's transport: the same float32 values."""
    encodings = dict.fromkeys(EXPECTED, "bf16")
    sent = wire_form(EXPECTED, encodings).encode({n: torch.randn(shape) for n, shape in EXPECTED.items()}, None)
    content = encode(request(), sent)
    arrived = recorddict_from_proto(recorddict_to_proto(content))
    here, there = tensors_of(content, EXPECTED, encodings), tensors_of(arrived, EXPECTED, encodings)
    assert all(torch.equal(tensor, there[name]) for name, tensor in here.items())
    assert here.keys() == EXPECTED.keys()
    with pytest.raises(ProtocolError):
        tensors_of(content, EXPECTED)
    sent["packed/bf16"] = torch.full([9], float("inf"), dtype=torch.bfloat16)
    with pytest.raises(ProtocolError):
        tensors_of(encode(request(), sent), EXPECTED, encodings)
