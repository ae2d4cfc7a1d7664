"""What a node may use of its machine, as the operating system and torch enforce it."""

from __future__ import annotations

import resource
from pathlib import Path

import torch

from conclave.base.errors import BadInputError
from conclave.clients.capacity import process_memory
from conclave.clients.operations_config import LimitsConfig


def keep_to(limits: LimitsConfig) -> None:
    """Keep this process, and those that it starts from now on, to the limits.

    Training keeps within them by public shapes (:mod:`conclave.clients.capacity`): whether a node answers may not
    depend on how many records a round draws.

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


def bytes_in_use() -> int:
    """Return what counts against ``limits.memory_mb`` now; 0 if the system does not say."""
    try:
        status = Path("/proc/self/status").read_text()
    except OSError:
        return 0
    sizes = dict(line.split(":", 1) for line in status.splitlines() if ":" in line)
    return int(sizes["VmData"].split()[0]) * 1024 if "VmData" in sizes else 0


def check_room(in_use: int) -> None:
    """Refuse to start if program and records leave less for training than a node counts on.

    Args:
        in_use: bytes, once the records are read. Told only to the owner, before the node answers anybody.

    Raises:
        BadInputError: they take more than their part of what this process may have.
    """
    memory = process_memory()
    if memory is not None and in_use > memory.before_training:
        raise BadInputError(
            f"limits.memory_mb is {memory.limit_bytes >> 20}, must be more: program and records take "
            f"{in_use >> 20} MiB of it, and may take {memory.before_training >> 20}, for training needs the rest"
        )
