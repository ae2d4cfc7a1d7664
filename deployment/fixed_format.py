"""How a node's data are laid out is fixed with its first run, where units are held out.

A record's side is the hash of what was read (:mod:`data.held_out`). Read otherwise, other columns or another scale, the
same record would be another one, and could train today and be held out tomorrow: it would bear both budgets.
"""

from __future__ import annotations

import json
from pathlib import Path

from data.formats.config import FormatConfig
from model.errors import BadInputError
from model.store import write_atomically
from privacy.canonical import sha256
from privacy.ledger import Ledger


def check_format(path: Path, config: FormatConfig, training: Ledger, held_out: Ledger) -> None:
    """Keep a format in the file ``path`` while neither side has an entry; from then on it must be the kept one.

    Raises:
        BadInputError: it is another, or the file is lost.
    """
    spelled = json.dumps(config.model_dump(mode="json", exclude_defaults=True), sort_keys=True)
    now = sha256(spelled.encode())
    if training.head.seq == held_out.head.seq == 0:
        write_atomically(path, now.encode(), mode=0o600)
        return
    try:
        kept = path.read_text()
    except OSError as error:
        raise BadInputError(f"{path}: cannot be read, must be what the node's first run left; restore it") from error
    if kept != now:
        raise BadInputError(
            "[format] in node.toml is not what it was in the node's first run, must be: records would change between "
            "training and held-out"
        )
