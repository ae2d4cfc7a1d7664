"""A node's claims on its data: in which registry they are, and where the data have ever lain."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from conclave.base.canonical import canonical_json
from conclave.base.errors import BadInputError
from conclave.base.whole_file import write_atomically
from conclave.privacy.ledger.upkeep import registry
from conclave.privacy.ledger.upkeep.registry import Owner


class DataClaims:
    """The claims of one node, and the file in its state that remembers them, in case the registry is lost.

    Nothing in it follows from what the data hold.
    """

    def __init__(self, record: Path) -> None:
        self.record = record

    def remember(self, folder: Path, places: Sequence[Path]) -> None:
        """Write down in which registry the claims are, and the places that were ever claimed.

        Raises:
            BadInputError: it cannot be written.
        """
        document = canonical_json({"places": sorted(map(str, places)), "registry": str(folder.resolve())})
        try:
            if not self.record.exists() or self.record.read_bytes() != document:
                write_atomically(self.record, document, mode=0o600)
        except OSError as error:
            raise BadInputError(f"{self.record}: cannot be written ({error.strerror})") from error

    def check(self, dataset_id: str, data: Path, owner: Owner, *, moved: bool = False) -> None:
        """Look at the claims of a ledger that exists; see :func:`conclave.privacy.ledger.upkeep.registry.hold`.

        Raises:
            BadInputError: as there, or the file of this node cannot be read.
        """
        folder, before = self._remembered()
        if folder is None or not folder.is_dir():  # of an earlier release, on another machine, or lost
            folder = registry.default_registry()
        places = registry.hold(folder, dataset_id, data, owner, before=before, moved=moved)
        self.remember(folder, places)

    def _remembered(self) -> tuple[Path | None, list[Path]]:
        try:
            document = json.loads(self.record.read_bytes())
            return Path(document["registry"]), [Path(name) for name in document["places"]]
        except FileNotFoundError:
            return None, []
        except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
            raise BadInputError(f"{self.record}: cannot be read, must be what the node wrote; restore it") from error
