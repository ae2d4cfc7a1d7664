"""What a node may use of its machine, as the operating system and torch enforce it."""

from __future__ import annotations

import resource

import torch

from clients.operations_config import LimitsConfig
from model.errors import BadInputError


def keep_to(limits: LimitsConfig) -> None:
    """Keep this process, and those that it starts from now on, to the limits.

    More memory than allowed is a failed allocation: in the middle of a round that is ``internal-error`` to the server,
    and what the round was charged stays spent.

    Raises:
        BadInputError: this process may not have as much memory.
    """
    if limits.threads is not None:
        torch.set_num_threads(limits.threads)
    if limits.memory_mb is not None:
        most = limits.memory_mb * 2**20
        try:
            resource.setrlimit(resource.RLIMIT_DATA, (most, most))
        except ValueError as error:  # a hard limit is for root alone to raise
            allowed = resource.getrlimit(resource.RLIMIT_DATA)[1] // 2**20
            raise BadInputError(
                f"limits.memory_mb is {limits.memory_mb}, must be at most the {allowed} that this process may have "
                "(ulimit -d)"
            ) from error
