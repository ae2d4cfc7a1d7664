"""Who takes part in a round."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Sequence

from conclave.server.assign.config import CohortConfig, FixedCohort, PoissonCohort


def public_generator(seed: int, *labels: str | int) -> random.Random:
    """Return a generator for public choices (cohorts, assignments), a pure function of its arguments.

    It is predictable by design: never draw anything private from it.
    """
    text = "\x1f".join(str(label) for label in (seed, *labels))
    return random.Random(hashlib.sha256(text.encode()).digest())  # noqa: S311  (public randomness)


def choose_cohort(nodes: Sequence[str], config: CohortConfig, seed: int, round_number: int) -> list[str]:
    """Return the fingerprints that take part in a round, sorted; a pure function of its arguments."""
    generator = public_generator(seed, "cohort", round_number)
    ordered = sorted(nodes)
    if isinstance(config, FixedCohort):
        return sorted(generator.sample(ordered, min(config.size, len(ordered))))
    if isinstance(config, PoissonCohort):
        return [node for node in ordered if generator.random() < config.rate]
    return ordered


def expected_share(config: CohortConfig, nodes: int) -> float:
    """Return the share of ``nodes`` (at least one) that a round is expected to ask."""
    if isinstance(config, FixedCohort):
        return min(1.0, config.size / nodes)
    return config.rate if isinstance(config, PoissonCohort) else 1.0
