"""Dealing records to nodes: disjoint, complete, seeded, as skewed as asked."""

from __future__ import annotations

from collections import Counter
from math import log

import numpy as np
import pytest
import torch
from pydantic import TypeAdapter, ValidationError

from conclave.base.errors import BadInputError
from conclave.data.config import PartitionConfig
from conclave.data.partition import partition

LABELS = np.random.default_rng(0).integers(10, size=1437)
SCHEMES = [
    {"scheme": "iid", "nodes": 10},
    {"scheme": "iid", "nodes": 7},
    {"scheme": "dirichlet", "nodes": 10, "alpha": 0.5},
    {"scheme": "dirichlet", "nodes": 5, "alpha": 100.0},
    {"scheme": "pathological", "nodes": 10, "labels_per_node": 2},
    {"scheme": "pathological", "nodes": 20, "labels_per_node": 3},
]


def config(document):
    return TypeAdapter(PartitionConfig).validate_python(document)


def deal(document, seed=1, labels=LABELS):
    return partition({"label": torch.as_tensor(labels)}, config(document), seed)


def entropy(share):
    """Entropy of a node's labels, in nats."""
    counts = Counter(LABELS[share].tolist())
    return -sum(c / len(share) * log(c / len(share)) for c in counts.values())


@pytest.mark.parametrize("document", SCHEMES)
def test_shares_are_disjoint_and_complete(document):
    shares = deal(document)
    assert len(shares) == document["nodes"]
    assert sorted(np.concatenate(shares).tolist()) == list(range(len(LABELS)))
    assert all(len(share) > 0 for share in shares)


@pytest.mark.parametrize("document", SCHEMES)
def test_shares_follow_the_seed_and_nothing_else(document):
    np.random.seed(1)
    one = deal(document)
    np.random.seed(2)
    again, other = deal(document), deal(document, seed=2)
    assert all(np.array_equal(a, b) for a, b in zip(one, again, strict=True))
    assert not all(np.array_equal(a, b) for a, b in zip(one, other, strict=True))


def test_iid_shares_are_equal_in_size_and_drawn_from_everywhere():
    for nodes in (10, 7):
        shares = deal({"scheme": "iid", "nodes": nodes})
        assert max(map(len, shares)) - min(map(len, shares)) <= 1
        for share in shares:
            # Hypergeometric: 1 share of 143 (205) has 72 ± 5.7 (103 ± 6.6) records below the middle. At 6 standard
            # deviations the false alarm over all 17 shares is below 1e-7; a share cut in order has all or none.
            below = int((share < len(LABELS) / 2).sum())
            assert abs(below - len(share) / 2) < 6 * (len(share) * (1 - len(share) / len(LABELS)) / 4) ** 0.5


def test_a_smaller_alpha_is_more_skewed():
    def mean_entropy(document):
        return float(np.mean([entropy(share) for share in deal(document)]))

    iid = mean_entropy({"scheme": "iid", "nodes": 10})
    mild = mean_entropy({"scheme": "dirichlet", "nodes": 10, "alpha": 1.0})
    harsh = mean_entropy({"scheme": "dirichlet", "nodes": 10, "alpha": 0.2})
    assert iid > log(10) - 0.1
    assert harsh + 0.2 < mild < iid - 0.2


def test_dirichlet_keeps_its_minimum():
    shares = deal({"scheme": "dirichlet", "nodes": 10, "alpha": 0.3, "min_records": 40})
    assert min(map(len, shares)) >= 40


@pytest.mark.parametrize("labels_per_node", [1, 2, 3, 10])
def test_pathological_nodes_see_few_labels(labels_per_node):
    for share in deal({"scheme": "pathological", "nodes": 12, "labels_per_node": labels_per_node}):
        assert 1 <= len(set(LABELS[share].tolist())) <= labels_per_node


@pytest.mark.parametrize(
    "document",
    [
        {"scheme": "iid", "nodes": 1438},
        {"scheme": "dirichlet", "nodes": 1438, "alpha": 1.0},
        {"scheme": "dirichlet", "nodes": 200, "alpha": 0.1},
        {"scheme": "dirichlet", "nodes": 2, "alpha": 1.0, "min_records": 1000},
        {"scheme": "pathological", "nodes": 10, "labels_per_node": 11},
        {"scheme": "pathological", "nodes": 2, "labels_per_node": 2},  # would leave six labels to nobody
        {"scheme": "pathological", "nodes": 1437, "labels_per_node": 1},
    ],
)
def test_what_cannot_be_dealt_is_one_sentence(document):
    with pytest.raises(BadInputError) as caught:
        deal(document)
    message = str(caught.value)
    assert message.startswith("partition")
    assert str(document["nodes"]) in message
    assert "\n" not in message


@pytest.mark.parametrize(
    "document",
    [
        {"scheme": "iid", "nodes": 0},
        {"scheme": "iid", "nodes": 3, "alpha": 1.0},
        {"scheme": "dirichlet", "nodes": 3},
        {"scheme": "dirichlet", "nodes": 3, "alpha": 0.0},
        {"scheme": "pathological", "nodes": 3, "labels_per_node": 0},
        {"scheme": "quantity", "nodes": 3},
        {"nodes": 3},
    ],
)
def test_configuration_refuses_what_makes_no_sense(document):
    with pytest.raises(ValidationError):
        config(document)


GROUPS = torch.tensor([0] * 50 + [1] * 30 + [2] * 20 + [3] * 20 + [4] * 10 + [5] * 10)


def test_groups_stay_whole_and_nodes_come_out_alike():
    shares = partition({"text": torch.zeros(140, 4), "group": GROUPS}, config({"scheme": "groups", "nodes": 3}), 0)
    assert sorted(np.concatenate(shares).tolist()) == list(range(140))
    owners = [set(GROUPS[share].tolist()) for share in shares]
    assert sum(map(len, owners)) == 6  # no group on two nodes
    assert sorted(map(len, shares)) == [40, 50, 50]


def test_records_without_the_key_cannot_be_dealt_by_it():
    text, image = {"text": torch.zeros(9, 4), "group": GROUPS[:9]}, {"label": torch.zeros(9)}
    with pytest.raises(BadInputError, match="have no labels"):
        partition(text, config({"scheme": "dirichlet", "nodes": 2, "alpha": 1.0}), 0)
    with pytest.raises(BadInputError, match="have no groups"):
        partition(image, config({"scheme": "groups", "nodes": 2}), 0)
    with pytest.raises(BadInputError, match="at most the 1 groups"):
        partition(text, config({"scheme": "groups", "nodes": 2}), 0)
    assert sum(map(len, partition(text, config({"scheme": "iid", "nodes": 2}), 0))) == 9
