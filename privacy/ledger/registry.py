"""One ledger per dataset: which datasets of this user's machine have a ledger already.

Two ledgers for one dataset would be two budgets for the same people.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from pathlib import Path

from model.errors import BadInputError
from model.whole_file import new_file
from privacy.canonical import canonical_json, sha256


def default_registry() -> Path:
    """Return the folder of claims: ``$XDG_STATE_HOME/conclave/datasets``, by default under ``~/.local/state``."""
    state = os.environ.get("XDG_STATE_HOME") or str(Path.home() / ".local" / "state")
    return Path(state) / "conclave" / "datasets"


def claim(registry: Path, dataset_id: str, data: Path, ledger: Path) -> list[Path]:
    """Claim a dataset, by its name and by where its data lie, for a ledger that is about to be created.

    Claiming again for the same ledger file changes nothing.

    Returns:
        The claims that are new; :func:`release` takes them back where no ledger came into being.

    Raises:
        BadInputError: the name, the data, a folder around them or something in them are claimed for another ledger, or
            the claim cannot be written, or one of them is no text in UTF-8.
    """
    ledger = ledger.resolve()
    for text in (dataset_id, str(data.resolve()), str(ledger)):
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise BadInputError(f"{text!r}: is no text in UTF-8, must be a name or path that is") from error
    _refuse_overlap(registry, data.resolve(), ledger)
    claims = {
        registry / f"{sha256(f'{what} {name}'.encode())}.json": (what, name)
        for what, name in (("dataset", dataset_id), ("data", str(data.resolve())))
    }
    written: list[Path] = []
    try:
        for path, (what, name) in claims.items():
            if _claim(path, what, name, ledger):
                written.append(path)
    except BadInputError:
        release(written)  # the name is still free where the data are not
        raise
    return written


def release(claims: Iterable[Path]) -> None:
    """Take claims back that no ledger was created for."""
    for path in claims:
        path.unlink(missing_ok=True)


def _refuse_overlap(registry: Path, data: Path, ledger: Path) -> None:
    for path in sorted(registry.glob("*.json")):
        try:
            document = json.loads(path.read_bytes())
            other, held = Path(document["data"]), str(document["ledger"])
        except (OSError, ValueError, KeyError, TypeError):  # of a name, or unreadable: found where it is claimed again
            continue
        if held != str(ledger) and (other in data.parents or data in other.parents):
            raise BadInputError(
                f"the data {data} overlap with {other}, which have a ledger already ({held}), must not get a second "
                "one: two ledgers are two budgets for the same people"
            )


def _claim(path: Path, what: str, name: str, ledger: Path) -> bool:
    """Make one claim; return False where the same ledger made it before."""
    document = canonical_json({what: name, "ledger": str(ledger)})
    try:
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        with new_file(path, mode=0o600) as stream:
            stream.write(document)
    except FileExistsError:
        held = _ledger_of(path)
        if held != str(ledger):
            raise BadInputError(
                f"the {what} {name} has a ledger already ({held}), must not get a second one: "
                "two ledgers are two budgets for the same people"
            ) from None
        return False
    except OSError as error:
        raise BadInputError(
            f"{path.parent}: cannot be written ({error.strerror}), must be a writable folder"
        ) from error
    return True


def _ledger_of(path: Path) -> str:
    try:
        return str(json.loads(path.read_bytes())["ledger"])
    except (OSError, ValueError, KeyError, TypeError):
        return f"unreadable claim {path}"
