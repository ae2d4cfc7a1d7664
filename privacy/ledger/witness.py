"""The witness: the ledger's last head, kept by the owner outside the database.

A database that was restored from a backup, or replaced by an older copy, has forgotten charges. The witness has not:
put it on another disk or machine than the database.
"""

from __future__ import annotations

import fcntl
import os
from collections.abc import Callable
from pathlib import Path

from pydantic import ValidationError

from conclave.base.errors import BadInputError
from conclave.base.reading import without_mark
from conclave.base.whole_file import write_atomically
from conclave.privacy.ledger.errors import WitnessUnavailableError
from conclave.privacy.ledger.heads import SignedHead


class Witness:
    """A file that holds one signed head, replaced atomically and durably, readable by its owner only."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def read(self) -> SignedHead | None:
        """Return the head it holds; None if there is no file.

        Raises:
            WitnessUnavailableError: the file cannot be read.
            BadInputError: it holds something else.
        """
        try:
            line = self.path.read_bytes()
        except FileNotFoundError:
            return None
        except OSError as error:
            raise WitnessUnavailableError(
                f"{self.path}: the ledger's witness cannot be read ({error.strerror}), must be a readable file"
            ) from error
        try:
            head = SignedHead.model_validate_json(without_mark(line))
        except ValidationError as error:
            raise BadInputError(f"{self.path}: not a witness, must hold one signed head of a ledger") from error
        return head

    def mirror(self, latest: Callable[[], SignedHead]) -> None:
        """Replace its content with the ledger's latest head.

        ``latest`` is asked under a lock, so of two processes the later one never writes the older head.

        Raises:
            WitnessUnavailableError: the file cannot be written.
        """
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            lock = os.open(self.path.with_name(f"{self.path.name}.lock"), os.O_CREAT | os.O_RDWR, 0o600)
            try:
                fcntl.flock(lock, fcntl.LOCK_EX)
                write_atomically(self.path, latest().line + b"\n", mode=0o600)
            finally:
                os.close(lock)
        except OSError as error:
            raise WitnessUnavailableError(
                f"{self.path}: the ledger's witness cannot be written ({error.strerror}), must be in a writable place"
            ) from error
