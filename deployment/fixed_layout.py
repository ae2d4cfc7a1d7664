"""What records' identities depend on beside the records themselves is fixed with a node's first run.

Where units are held out, a unit's side is a keyed hash of its identity, and a record's is a hash of what is stored
(:mod:`data.formats.identity`). The same table with one more column, with another delimiter or in another format stores
every record otherwise, and another column of groups makes other units: each could train today and be held out tomorrow,
and would bear both budgets. So it could under a later version that hashes otherwise. What is made of the stored data,
the features, scales, sizes and labels, moves nobody and may change.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from model.errors import BadInputError
from model.store import write_atomically
from privacy.canonical import sha256
from privacy.ledger import Ledger


def check_layout(path: Path, stored_as: Sequence[str], training: Ledger, held_out: Ledger) -> None:
    """Keep what identities depend on in the file ``path`` while neither side has an entry; then it must be the same.

    Args:
        stored_as: :attr:`data.private_data.PrivateData.stored_as`. Public.

    Raises:
        BadInputError: it is another, or the file is lost.
    """
    now = sha256(json.dumps(list(stored_as)).encode())
    if training.head.seq == held_out.head.seq == 0:
        write_atomically(path, now.encode(), mode=0o600)
        return
    try:
        kept = path.read_text()
    except OSError as error:
        raise BadInputError(f"{path}: cannot be read, must be what the node's first run left; restore it") from error
    if kept != now:
        raise BadInputError(
            "the data are stored or grouped otherwise than in the node's first run, must have the same format, "
            "columns, delimiter, array and groups: records would change between training and held-out"
        )
