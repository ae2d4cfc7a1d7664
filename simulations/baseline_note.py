"""What a run directory says about the baseline that it holds: ``baseline.json``."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import ValidationError

from conclave.base.errors import BadInputError
from conclave.base.frozen import Frozen
from conclave.base.reading import read_text
from conclave.base.whole_file import write_atomically


class BaselineNote(Frozen):
    """Which baseline of which scenario a run is.

    parameters, parameters_wanted: of a dense model, and what it should match. quality_of_nodes: accuracy, or bits per
    byte, of each node that trained alone, once all have.
    """

    kind: Literal["central", "alone", "dense-total", "dense-active"]
    of: str
    parameters: int | None = None
    parameters_wanted: int | None = None
    quality_of_nodes: tuple[float, ...] = ()

    @property
    def federated(self) -> bool:
        """Whether nodes exchange anything."""
        return self.kind not in ("central", "alone")

    def write(self, folder: Path) -> None:
        """Leave it in a run directory."""
        write_atomically(folder / "baseline.json", self.model_dump_json(indent=2, exclude_defaults=True).encode())


def read_note(folder: Path) -> BaselineNote | None:
    """Return the note in a run directory; None where the run is no baseline.

    Raises:
        BadInputError: it is damaged.
    """
    path = folder / "baseline.json"
    if not path.is_file():
        return None
    try:
        return BaselineNote.model_validate_json(read_text(path, "a baseline's note"))
    except ValidationError as error:
        raise BadInputError(f"{path}: damaged, must be as the baseline's run left it") from error
