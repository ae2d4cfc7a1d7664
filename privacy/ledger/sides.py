"""The two ledgers of one data set: of the units that train, and of those held out for evaluation."""

from __future__ import annotations

from conclave.base.errors import BadInputError
from conclave.privacy.ledger.entry import Genesis


def check_pair(training: Genesis, held_out: Genesis) -> None:
    """Check that two ledgers are the two sides of one data set.

    Raises:
        BadInputError: a unit could be on both sides, or protected by neither.
    """
    if (training.side, held_out.side) != ("training", "held-out"):
        raise BadInputError(f"the ledgers are for {training.side} and {held_out.side} units, must be for both")
    for name in ("dataset_id", "split_key", "held_out", "unit", "adjacency", "mode"):
        if getattr(training, name) != getattr(held_out, name):
            raise BadInputError(f"the ledgers of training and held-out units differ in {name}, must be of one data set")
