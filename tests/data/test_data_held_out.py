"""Which units are held out: decided by each unit alone, the same wherever it stands, and no unit on both sides."""

from __future__ import annotations

import hashlib
import hmac

import pytest
import torch

from conclave.data.held_out import by_content, by_group, split

KEY = bytes(range(32))


def records(count=400, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return {
        "image": torch.rand(count, 1, 4, 4, generator=generator),
        "label": torch.randint(10, (count,), generator=generator),
    }


def sides(found, identities=by_content, **options):
    return split(found, identities(found), **({"key": KEY, "share": 0.3} | options))


def keys(found):
    """Each record as bytes."""
    return [b"".join(found[name][i].numpy().tobytes() for name in sorted(found)) for i in range(len(found["label"]))]


def test_a_side_is_the_keyed_hash_of_the_record():
    given = records(50)
    train, held_out = sides(given)
    below = int(0.3 * 2.0**64)
    for record in keys(given):
        word = int.from_bytes(hmac.new(KEY, record, hashlib.sha256).digest()[:8], "big")
        assert (record in keys(held_out)) == (word < below)
        assert (record in keys(train)) == (word >= below)


def test_the_sides_are_disjoint_and_whole():
    given = records()
    train, held_out = sides(given)
    assert sorted(keys(train) + keys(held_out)) == sorted(keys(given))
    assert not set(keys(train)) & set(keys(held_out))


@pytest.mark.parametrize("share", [0.1, 0.3, 0.9])
def test_about_the_share_is_held_out(share):
    """False alarms: below 1e-6 for a random key (five deviations of a binomial); the key is fixed."""
    _, held_out = sides(records(4000), share=share)
    assert abs(len(held_out["label"]) - 4000 * share) < 5 * (4000 * share * (1 - share)) ** 0.5


def test_nobody_else_decides_a_side():
    given = records()
    side = dict(zip(keys(given), ["?"] * 400, strict=True))
    for name, found in zip(("train", "held out"), sides(given), strict=True):
        side |= dict.fromkeys(keys(found), name)
    shuffled = torch.randperm(400)[:150]
    fewer = {name: tensor[shuffled] for name, tensor in given.items()}
    more = {name: torch.cat([tensor[:7] + 1, tensor]) for name, tensor in given.items()}  # records before all others
    for other in (fewer, more):
        for name, found in zip(("train", "held out"), sides(other), strict=True):
            assert all(side.get(key, name) == name for key in keys(found))


def test_equal_records_are_on_one_side():
    given = records(60)
    twice = {name: torch.cat([tensor, tensor]) for name, tensor in given.items()}
    train, held_out = sides(twice)
    assert all(keys(train).count(key) == 2 for key in keys(train))
    assert all(keys(held_out).count(key) == 2 for key in keys(held_out))


def test_groups_stay_whole_and_their_records_do_not_matter():
    given = records(300) | {"group": torch.arange(300) // 5 * 7}
    train, held_out = sides(given, by_group)
    assert 0 < len(held_out["group"]) < 300
    assert not set(train["group"].tolist()) & set(held_out["group"].tolist())
    changed = given | {"image": 1 - given["image"]}
    assert sides(changed, by_group)[1]["group"].tolist() == held_out["group"].tolist()


def test_another_key_divides_otherwise():
    given = records()
    assert keys(sides(given)[1]) != keys(sides(given, key=bytes(32))[1])


def test_no_share_holds_nothing_out_and_nothing_can_be_divided():
    train, held_out = sides(records(), share=0.0)
    assert (len(train["label"]), len(held_out["label"])) == (400, 0)
    for identities in (by_content, by_group):
        empty = {name: tensor[:0] for name, tensor in (records(3) | {"group": torch.arange(3)}).items()}
        assert all(len(found["label"]) == 0 for found in sides(empty, identities))
