"""One ledger per dataset: which datasets on this machine already have a ledger, for this user.

Two ledgers for one dataset would be two budgets for the same people. A claim says whose a name or a place is; it is
made before a ledger is, checked whenever one is opened, and never given back: what a ledger has paid for once stays its
own, even if the ledger is lost or the data have moved.

What one user's machine cannot know is a copy of data on another disk, and what another user or machine has.
"""

from __future__ import annotations

import fcntl
import json
import os
import unicodedata
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

from platformdirs.unix import Unix

from conclave.base.canonical import canonical_json, sha256
from conclave.base.errors import BadInputError
from conclave.base.whole_file import new_file, write_atomically
from conclave.privacy.ledger.upkeep.data_place import DataPlace, look_at

_TWICE = "must not get a second one: two ledgers are two budgets for the same people"


def default_registry() -> Path:
    """Return the folder of claims: ``$XDG_STATE_HOME/conclave/datasets``, by default under ``~/.local/state``.

    By the rules of Unix on every system: a place of macOS's own would hide the claims that earlier releases made.
    """
    return Unix("conclave").user_state_path / "datasets"


@dataclass(frozen=True)
class Owner:
    """Whose a claim is.

    ledger: the ledger's file. ids: of the ledgers of both sides; none before these exist, and in an earlier release's
        claims.
    """

    ledger: Path
    ids: tuple[str, ...] = ()

    def __str__(self) -> str:
        return f"{self.ledger}, {self.ids[0]}" if self.ids else str(self.ledger)


@dataclass(frozen=True)
class Claim:
    """One claim, as its file says.

    what, name: the dataset's name, or the path where data lie.
    used: whether the ledger was created. Until then nothing can have been spent, and the same call again completes what
        was interrupted. Earlier releases did not say.
    seen: files that were there when the claim was last looked at; see :attr:`DataPlace.known`.
    """

    what: Literal["dataset", "data"]
    name: str
    owner: Owner
    used: bool = True
    seen: Mapping[str, str] = field(default_factory=dict)

    def file_in(self, registry: Path) -> Path:
        """Return the claim's file."""
        return registry / f"{sha256(f'{self.what} {self.name}'.encode())}.json"

    @property
    def line(self) -> bytes:
        """The canonical JSON."""
        document: dict[str, object] = {self.what: self.name, "ledger": str(self.owner.ledger), "used": self.used}
        if self.owner.ids:
            document["ledger_ids"] = list(self.owner.ids)
        if self.what == "data":
            document["seen"] = dict(self.seen)
        return canonical_json(document)


def claim(registry: Path, dataset_id: str, data: Path, ledger: Path, *, exists: bool = False) -> list[Path]:
    """Claim a dataset, by its name and by where its data lie, for a ledger that is about to be created.

    Claiming again for the same ledger changes nothing.

    Args:
        exists: whether the ledgers of both sides are there, from an attempt that was interrupted after them.

    Returns:
        The claims that are new; :func:`withdraw` takes them back where no ledger came into being.

    Raises:
        BadInputError: the name, the data, a folder around them, something in them or a file that a link leads to are
            claimed for another ledger, or for this one, which is lost; the claim cannot be written, or one of them is
            no text in UTF-8.
    """
    owner = Owner(ledger.resolve())
    for text in (dataset_id, str(data.resolve()), str(owner.ledger)):
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise BadInputError(f"{text!r}: is no text in UTF-8, must be a name or path that is") from error
    with _locked(registry):
        place, claims = look_at(data), _read(registry)
        mine = [one for one in claims if _is_of(one, owner) and (exists or not one.used)]
        _refuse_others([one for one in claims if one not in mine], dataset_id, [place])
        written: list[Path] = []
        try:
            for one in _claims(dataset_id, [place], owner, used=False):
                if not one.file_in(registry).exists():
                    _write(registry, one)
                    written.append(one.file_in(registry))
        except BadInputError:
            withdraw(written)  # the name is still free where the data are not
            raise
    return written


def hold(
    registry: Path, dataset_id: str, data: Path, owner: Owner, *, before: Iterable[Path] = (), moved: bool = False
) -> list[Path]:
    """Check the claims of an existing ledger before it is used; a lost claim is made again.

    Args:
        before: where its data lay, as the ledger's own folder remembers.
        moved: whether the owner has said that data or ledger lie elsewhere now. Without that word data at a new place
            are refused. What was claimed stays so.

    Returns:
        All places that are this ledger's.

    Raises:
        BadInputError: the name or the data are another ledger's, another copy of this ledger lies where it was, the
            data lie where they never did, or a claim cannot be read or written.
    """
    owner = replace(owner, ledger=owner.ledger.resolve())
    with _locked(registry):
        claims = _read(registry)
        gone = {one.owner.ledger for one in claims if _says_less(one, dataset_id)}
        mine = [one for one in claims if _is_of(one, owner) or (not one.owner.ids and one.owner.ledger in gone)]
        for one in mine:
            if not moved and _is_elsewhere(one.owner.ledger, owner.ledger):
                raise BadInputError(
                    f"{owner.ledger}: is a copy of {one.owner.ledger}, must not be used beside it; conclave node "
                    "restore goes on with this one, and the other refuses from then on"
                )
        place = look_at(data)
        known = {str(path) for path in before} | {one.name for one in mine if one.what == "data"}
        if known and str(place.path) not in known and not moved:
            raise BadInputError(
                f"dataset.data is {place.path}, where this ledger's data did not lie ({', '.join(sorted(known))}); "
                "conclave node claim says that they have moved, or that more are added: the budget stays the same"
            )
        places = [place, *(look_at(Path(name)) for name in sorted(known - {str(place.path)}))]
        _refuse_others([one for one in claims if one not in mine], dataset_id, places)
        old = {one.file_in(registry): one for one in mine}
        for one in _claims(dataset_id, places, owner, used=True):
            before_it = old.get(one.file_in(registry))
            if before_it is not None:
                one = replace(one, seen={**before_it.seen, **one.seen})
            if one != before_it:
                _write(registry, one, must=before_it is None or moved)
    return [one.path for one in places]


def withdraw(claims: Iterable[Path]) -> None:
    """Take claims back that no ledger was created for."""
    for path in claims:
        path.unlink(missing_ok=True)


def _claims(dataset_id: str, places: Sequence[DataPlace], owner: Owner, *, used: bool) -> list[Claim]:
    by_name = Claim("dataset", dataset_id, owner, used)
    return [by_name, *(Claim("data", str(place.path), owner, used, place.known) for place in places)]


def _is_of(one: Claim, owner: Owner) -> bool:
    if one.owner.ids and owner.ids:
        return one.owner.ids == owner.ids
    return one.owner.ledger == owner.ledger


def _says_less(one: Claim, dataset_id: str) -> bool:
    """Whether a claim from before ids were written may be that of a ledger of this dataset that moved since."""
    return (one.what, one.name, one.owner.ids) == ("dataset", dataset_id, ()) and not one.owner.ledger.exists()


def _is_elsewhere(claimed: Path, ledger: Path) -> bool:
    """Whether there are two ledgers. A file with a name in each of two folders counts as two: each has its own log."""
    if claimed == ledger or not claimed.exists():
        return False
    return not (claimed.samefile(ledger) and claimed.parent.samefile(ledger.parent))


def _refuse_others(claims: Sequence[Claim], dataset_id: str, places: Sequence[DataPlace]) -> None:
    """Refuse what is another ledger's: first the name, then the places, then what links lead to."""
    for one in claims:
        if one.what == "dataset" and _spelled(one.name) == _spelled(dataset_id):
            raise BadInputError(f"the dataset {dataset_id} {_has_one(one)}")
    taken = [one for one in claims if one.what == "data"]
    for place in places:
        for one in taken:
            other = Path(one.name)
            if other == place.path:
                raise BadInputError(f"the data {place.path} {_has_one(one)}")
            if other in place.path.parents or place.path in other.parents:
                raise BadInputError(
                    f"the data {place.path} overlap with {other}, which have a ledger already ({one.owner}), {_TWICE}"
                )
        for one in taken:
            shared = place.shared_with(look_at(Path(one.name)))
            if shared is not None:
                raise BadInputError(
                    f"the data {place.path} overlap with {one.name}, for {shared} is there too: that {_has_one(one)}"
                )
            if place.seen_in(one.seen):
                raise BadInputError(f"the data {place.path} lay at {one.name} before: that {_has_one(one)}")


def _has_one(one: Claim) -> str:
    lost = ""
    if not one.used:
        lost = "; an interrupted node init began it, and the same again completes it"
    elif not one.owner.ledger.exists():
        lost = "; it is lost and must be restored from a backup, conclave node restore"
    return f"has a ledger already ({one.owner}), {_TWICE}{lost}"


def _spelled(name: str) -> str:
    """Return what names that look the same have in common: all but case, width, blanks and invisible characters."""
    seen = "".join(c for c in name if unicodedata.category(c) not in ("Cf", "Cc") or c.isspace())
    folded = unicodedata.normalize("NFKC", seen).casefold()
    return " ".join(unicodedata.normalize("NFKC", folded).split())


def _read(registry: Path) -> list[Claim]:
    try:
        return [_parse(path) for path in sorted(registry.glob("*.json"))]
    except OSError as error:
        raise BadInputError(f"{registry}: cannot be read ({error.strerror}), must be a readable folder") from error


def _parse(path: Path) -> Claim:
    try:
        document = json.loads(path.read_bytes())
        what: Literal["dataset", "data"] = "dataset" if "dataset" in document else "data"
        ids = tuple(map(str, document.get("ledger_ids", ())))
        owner = Owner(Path(document["ledger"]), ids)
        return Claim(what, str(document[what]), owner, bool(document.get("used", True)), dict(document.get("seen", {})))
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        # It might be about these very data.
        raise BadInputError(f"unreadable claim {path}, must say whose a dataset is; put it back") from error


def _write(registry: Path, one: Claim, *, must: bool = True) -> None:
    """Write a claim; if it need not be written and cannot be, it stays as it was."""
    path = one.file_in(registry)
    try:
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        if path.exists():
            write_atomically(path, one.line, mode=0o600)
            return
        with new_file(path, mode=0o600) as stream:
            stream.write(one.line)
    except OSError as error:
        if must:
            raise BadInputError(
                f"{path.parent}: cannot be written ({error.strerror}), must be a writable folder"
            ) from error


@contextmanager
def _locked(registry: Path) -> Iterator[None]:
    """Let one process claim at a time, if the file system can lock a folder."""
    lock = None
    try:
        registry.mkdir(parents=True, exist_ok=True, mode=0o700)
        lock = os.open(registry, os.O_RDONLY)
        fcntl.flock(lock, fcntl.LOCK_EX)
    except OSError:  # read-only: what must be written says so
        pass
    try:
        yield
    finally:
        if lock is not None:
            os.close(lock)
