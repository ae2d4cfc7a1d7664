"""Canonical JSON against another implementation of RFC 8785, and where it is meant to differ."""

from __future__ import annotations

import pytest
import rfc8785
from hypothesis import given
from hypothesis import strategies as st

from conclave.base.canonical import canonical_json

KEYS = st.text(st.characters(exclude_categories=["Cs"], max_codepoint=0xFFFF))
SCALARS = (
    st.none() | st.booleans() | st.integers(-(2**53) + 1, 2**53 - 1) | st.text(st.characters(exclude_categories=["Cs"]))
)
DOCUMENTS = st.recursive(SCALARS, lambda inside: st.lists(inside) | st.dictionaries(KEYS, inside), max_leaves=20)


@given(DOCUMENTS)
def test_bytes_are_those_of_rfc_8785(document):
    assert canonical_json(document) == rfc8785.dumps(document)


def test_a_float_is_never_taken_for_an_integer():
    assert rfc8785.dumps([1.0]) == rfc8785.dumps([1])
    for document in (1.0, [1.0], {"a": {"b": (1.0,)}}):
        with pytest.raises(TypeError, match="float"):
            canonical_json(document)


def test_integers_have_no_bound():
    with pytest.raises(rfc8785.IntegerDomainError):
        rfc8785.dumps(2**53)
    assert canonical_json([2**53, -(2**64)]) == b"[9007199254740992,-18446744073709551616]"


def test_keys_are_sorted_by_code_points():
    keys = {"\U0001f600": 1, "\ufb01": 2}
    assert list(keys) == sorted(keys, key=lambda text: text.encode("utf-16-be"))
    assert rfc8785.dumps(keys) == '{"\U0001f600":1,"\ufb01":2}'.encode()
    assert canonical_json(keys) == '{"\ufb01":2,"\U0001f600":1}'.encode()
