"""What records' identities depend on besides the records themselves is fixed with a node's first run.

Where units are held out, a unit's side is a keyed hash of its identity, and a record's is a hash of what is stored
(:mod:`conclave.data.values.identity`). The same table with one more column, with another delimiter or in another format
stores every record differently, and another column of groups makes other units: each could train today and be held out
tomorrow, and would bear both budgets. The same holds for a later version that hashes differently. What is made of the
stored data, the features, scales, sizes and labels, moves nobody and may change.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from conclave.base.canonical import sha256
from conclave.base.errors import BadInputError
from conclave.base.whole_file import write_atomically


def keep_layout(path: Path, stored_as: Sequence[str], entries: int) -> None:
    """Keep what identities depend on in the file ``path`` while there are no entries; afterwards it must stay the same.

    Args:
        stored_as: :attr:`conclave.data.private_data.PrivateData.stored_as`. Public.
        entries: of the ledgers of both sides.

    Raises:
        BadInputError: it is another, or the file is lost.
    """
    if entries == 0:
        write_atomically(path, _digest(stored_as).encode(), mode=0o600)
    check_layout(path, stored_as, entries)


def check_layout(path: Path, stored_as: Sequence[str], entries: int) -> None:
    """Like :func:`keep_layout`, but write nothing.

    Raises:
        BadInputError: it is another, or the file is lost.
    """
    if entries == 0:
        return
    try:
        kept = path.read_text()
    except OSError as error:
        raise BadInputError(f"{path}: cannot be read, must be what the node's first run left; restore it") from error
    if kept != _digest(stored_as):
        raise BadInputError(
            "the data are stored or grouped otherwise than in the node's first run, must have the same format, "
            "columns, delimiter, array and groups: records would change between training and held-out"
        )


def _digest(stored_as: Sequence[str]) -> str:
    return sha256(json.dumps(list(stored_as)).encode())
