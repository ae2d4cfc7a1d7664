"""The node's own randomness."""

from __future__ import annotations

import numpy as np

from conclave.privacy.randomness import derive, fresh_secret, uniform_words


def test_keystream_matches_the_published_chacha20_vector():
    # RFC 8439, appendix A.1, test vector 1: zero key, zero nonce, counter 0.
    expected = bytes.fromhex("76b8e0ada0f13d90405d6ae55386bd28bdd219b8a08ded1aa836efcc8b770dc7")
    assert uniform_words(bytes(32), 4).astype("<u8").tobytes() == expected


def test_a_word_depends_on_secret_and_index_alone():
    secret = derive(bytes(32), "test")
    assert np.array_equal(uniform_words(secret, 10), uniform_words(secret, 1000)[:10])
    assert not np.array_equal(uniform_words(secret, 10), uniform_words(derive(secret, "x"), 10))


def test_derived_secrets_differ_by_every_label():
    root = bytes(range(32))
    names = [("a",), ("a", 0), ("a", 1), ("a", "0", ""), ("a0",), ("a1",), ("b",)]
    assert len({derive(root, *labels) for labels in names}) == len(names)
    assert derive(root, "a") != derive(bytes(32), "a")


def test_fresh_secrets_are_256_bits_and_never_repeat():
    secrets = {fresh_secret() for _ in range(50)}
    assert len(secrets) == 50
    assert {len(secret) for secret in secrets} == {32}
