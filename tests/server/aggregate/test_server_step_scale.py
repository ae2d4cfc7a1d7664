"""Steps scaled by contributions: the sum over max(n, expected), counted by hand."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from server_samples import SmallFederation, ask, delta_for, describe, held_of, train_reply

from conclave.model.parameters import owner
from conclave.server.assign.cohort import choose_cohort, expected_share
from conclave.server.assign.config import AllNodes, FixedCohort, PoissonCohort


@pytest.mark.parametrize(
    ("cohort", "share"),
    [
        (AllNodes(), 1.0),
        (FixedCohort(kind="fixed", size=3), 0.3),
        (FixedCohort(kind="fixed", size=30), 1.0),
        (PoissonCohort(kind="poisson", rate=0.25), 0.25),
    ],
)
def test_the_expected_share_is_the_mean_of_cohorts(cohort, share):
    assert expected_share(cohort, 10) == pytest.approx(share)
    nodes = [f"{n:016x}" for n in range(10)]
    mean = sum(len(choose_cohort(nodes, cohort, 1, r)) for r in range(4000)) / 40_000
    assert mean == pytest.approx(share, abs=0.01)  # the standard deviation is at most 0.0022


@pytest.mark.parametrize("answering", [1, 2, 4])
def test_an_expert_with_fewer_holders_than_expected_steps_less(answering):
    """Four nodes of three experts each, six experts: two holders are expected of each."""
    scaled, plain = (
        SmallFederation(nodes=4, assignment="random", weights="uniform", step_scale=kind)
        for kind in ("contributions", "none")
    )
    start = {n: t.clone() for n, t in scaled.model.tensors.items()}
    for federation in (scaled, plain):
        requests = ask(federation)[:answering]
        federation.answer(1, [train_reply(r, delta_for(r, federation)) for r in requests])
    holders = Counter(expert for r in requests for expert in held_of(r)[0])
    assert answering < 4 or max(holders.values()) > 2  # one with more than expected steps as far as without
    for name, tensor in scaled.model.tensors.items():
        moved, whole = tensor - start[name], plain.model.tensors[name] - start[name]
        n = holders[owner(name).expert]
        factor = 1.0 if owner(name).layer is None else min(1.0, n / 2)
        torch.testing.assert_close(moved, factor * whole, rtol=0, atol=1e-7)
        if owner(name).layer is not None:
            torch.testing.assert_close(moved, torch.full_like(moved, n * 0.001 / max(n, 2)), rtol=0, atol=1e-7)


def test_what_nodes_can_hold_and_who_is_asked_counts():
    federation = SmallFederation(nodes=4, step_scale="contributions", cohort={"kind": "fixed", "size": 2})
    federation.nodes = {11: describe(1, expert_capacity=2), **{10 + n: describe(n) for n in (2, 3, 4)}}
    start = {n: t.clone() for n, t in federation.model.tensors.items()}
    request = ask(federation)[0]
    federation.answer(1, [train_reply(request, delta_for(request, federation))])
    expected = (2 + 3 + 3 + 3) * (2 / 4) / 6
    for name, tensor in federation.model.tensors.items():
        if owner(name).layer is not None and owner(name).expert in held_of(request)[0]:
            torch.testing.assert_close(
                tensor - start[name], torch.full_like(tensor, 0.001 * min(1.0, 1 / expected)), rtol=0, atol=1e-7
            )
