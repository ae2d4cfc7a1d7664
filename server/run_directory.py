"""The run directory: everything one run leaves behind, enough to audit it."""

from __future__ import annotations

import json
import platform
import subprocess
from collections.abc import Mapping
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, get_args

from torch import Tensor

from conclave.base.errors import BadInputError
from conclave.base.reading import parse_json, read_text
from conclave.base.whole_file import append_durably, write_atomically
from conclave.model.config import ModelConfig
from conclave.model.store import save_model
from conclave.privacy.ledger.genesis import Mode
from conclave.protocol.code_identity import code_hash
from conclave.server.metrics import lacking, why_no_metrics
from conclave.server.scenario import Scenario, read_scenario

_TESTED_PACKAGES = ("conclave-moe", "torch", "flwr", "flwr-datasets", "opacus", "dp-accounting", "numpy")


class RunDirectory:
    """Paths inside a run directory, and how each file is written."""

    def __init__(self, path: Path) -> None:
        self.path = path

    @classmethod
    def create(cls, scenario: Scenario, out: Path | None = None, *, mode: Mode = "simulation") -> RunDirectory:
        """Create the directory: exactly ``out``, or ``runs/<scenario>-<utc time>``.

        Args:
            mode: what the nodes' ledgers of this run are.

        Raises:
            BadInputError: the directory is not empty, or cannot be created.
        """
        out = fresh_directory(scenario.name, out)
        run = cls(out)
        write_atomically(out / "environment.json", json.dumps(_environment(scenario.seed, mode), indent=2).encode())
        write_atomically(out / "scenario.toml", scenario.to_toml().encode())  # last: it makes this a run directory
        return run

    @classmethod
    def open(cls, path: Path) -> RunDirectory:
        """Open an existing run directory.

        Raises:
            BadInputError: it does not look like one.
        """
        if not (path / "scenario.toml").is_file():
            raise BadInputError(f"{path}: no scenario.toml here, must be a run directory")
        return cls(path)

    @property
    def scenario(self) -> Scenario:
        """The resolved scenario of the run."""
        return read_scenario(self.path / "scenario.toml")

    @property
    def environment(self) -> dict[str, Any]:
        """Versions and platform of the run.

        Raises:
            BadInputError: the file is missing or damaged.
        """
        path = self.path / "environment.json"
        try:
            document = parse_json(read_text(path, "the run's environment"))
        except BadInputError:
            raise
        except ValueError as error:
            raise BadInputError(f"{path}: damaged, must be as the run left it") from error
        if not isinstance(document, dict):
            raise BadInputError(f"{path}: damaged, must be as the run left it")
        return document

    def note_code(self) -> None:
        """Note which code runs here: a run may be resumed under another version than it began with.

        A directory that does not say what it began with is left as it is: it could not be completed.
        """
        if self.codes and code_hash() not in self.codes:
            document = self.environment | {"code": sorted({*self.codes, code_hash()})}
            write_atomically(self.path / "environment.json", json.dumps(document, indent=2).encode())

    @property
    def codes(self) -> frozenset[str]:
        """Hashes of the code that ran here (``protocol.code_identity``); empty where the run does not say."""
        try:
            return frozenset(map(str, self.environment.get("code", ())))
        except (BadInputError, TypeError):  # missing or damaged: it says nothing
            return frozenset()

    @property
    def ledgers(self) -> list[Path]:
        """Ledger files; only in a simulation."""
        return sorted((self.path / "ledgers").glob("*.db"))

    @property
    def mode(self) -> Mode | None:
        """What the nodes' ledgers must be; None if an older run does not say, or its environment is damaged."""
        if (self.path / "ledgers").is_dir():  # where a simulation's are begun, wherever they lie now
            return "simulation"
        try:
            stated = self.environment.get("mode")
        except BadInputError:
            return None
        return next((mode for mode in get_args(Mode) if mode == stated), None)

    @property
    def held_out_ledgers(self) -> list[Path]:
        """Ledger files of the units that nodes hold out of training; simulation only."""
        return sorted((self.path / "held-out").glob("*.db"))

    @property
    def checkpoint(self) -> Path:
        """The last round's checkpoint file."""
        return self.path / "checkpoint" / "round.safetensors"

    @property
    def receipts(self) -> Path:
        """The signed ledger heads that came with the replies."""
        return self.path / "receipts.jsonl"

    @property
    def choices(self) -> Path:
        """The experts that nodes chose, where they do; under the name that the file had when the run began."""
        earlier = self.path / "wishes.json"
        return earlier if earlier.exists() else self.path / "choices.json"

    @property
    def node_account(self) -> Path:
        """The server's ledger of what was published at node level, where the node is the unit."""
        return self.path / "node-level.db"

    @property
    def report(self) -> Path:
        """The report, a self-contained HTML file."""
        return self.path / "report.html"

    def metrics(self) -> list[dict[str, Any]]:
        """Return the metrics, one mapping a round.

        Raises:
            BadInputError: the run has no finished round, or a line is damaged.
        """
        path = self.path / "metrics.jsonl"
        refusal = f"{path}: missing or damaged, must hold one JSON object a line"
        if not path.is_file():
            raise BadInputError(refusal)
        text = read_text(path, "one JSON object a line")
        try:
            rounds = [parse_json(line) for line in text.splitlines()]
        except ValueError as error:
            raise BadInputError(refusal) from error
        for number, line in enumerate(rounds, start=1):
            wrong = why_no_metrics(line)
            if wrong is not None:
                raise BadInputError(f"{refusal}, as the run left it: line {number}: {wrong}")
        if not rounds:
            raise BadInputError(f"{path}: empty, the run must have finished a round")
        return rounds

    def whole_metrics(self) -> list[dict[str, Any]]:
        """Return the metrics, with all that they are summed up by.

        Raises:
            BadInputError: as :meth:`metrics`, or a line lacks something.
        """
        rounds = self.metrics()
        lack = lacking(rounds)
        if lack is not None:
            raise BadInputError(f"{self.path / 'metrics.jsonl'}: damaged, must be as the run left it: {lack}")
        return rounds

    def keep_metrics(self, rounds: int) -> list[dict[str, Any]]:
        """Return the metrics of the first ``rounds`` rounds; forget the others, and all from a damaged line on."""
        path = self.path / "metrics.jsonl"
        if not path.is_file():
            return []
        text, kept = "", []
        for line in path.read_text(errors="replace").splitlines():
            try:
                metrics = parse_json(line)
            except ValueError:
                break
            if why_no_metrics(metrics) is not None or metrics["round"] > rounds:
                break
            kept.append(metrics)
            text += line + "\n"
        write_atomically(path, text.encode())
        return kept

    def append_metrics(self, line: Mapping[str, Any]) -> None:
        """Append one round's metrics, durably."""
        append_durably(self.path / "metrics.jsonl", (json.dumps(line) + "\n").encode())

    def save_model(self, config: ModelConfig, wire: Mapping[str, Tensor]) -> None:
        """Write the final model."""
        save_model(self.path / "model", config, wire)


def fresh_directory(name: str, out: Path | None = None) -> Path:
    """Create an empty directory and return it: exactly ``out``, or ``runs/<name>-<utc time>``.

    Raises:
        BadInputError: it is not empty, or cannot be created.
    """
    if out is None:
        stamp = datetime.now(UTC).strftime("%Y%m%dT%H%M%S")
        out = _unused(Path("runs") / f"{name}-{stamp}")
    try:
        if out.exists() and (not out.is_dir() or any(out.iterdir())):
            raise BadInputError(f"--out {out}: not empty, must be a new or empty directory")
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise BadInputError(f"--out {out}: cannot be created ({error.strerror})") from error
    return out


def _unused(path: Path) -> Path:
    """Return ``path``, or the first of path-2, path-3, … that does not exist: two runs may start in one second."""
    candidate, number = path, 1
    while candidate.exists():
        number += 1
        candidate = path.with_name(f"{path.name}-{number}")
    return candidate


def _environment(seed: int, mode: Mode) -> dict[str, Any]:
    return {
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "seed": seed,
        "mode": mode,
        "commit": _git_commit(),
        "code": [code_hash()],
        "packages": {name: _version(name) for name in _TESTED_PACKAGES},
    }


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _git_commit() -> str | None:
    """Return the commit of the checkout that this code runs from, if it is one."""
    root = Path(__file__).resolve().parent.parent
    if not (root / ".git").exists():
        return None
    try:
        done = subprocess.run(
            ["git", "rev-parse", "HEAD"],  # noqa: S607
            cwd=root,
            capture_output=True,
            text=True,
            timeout=10,
            check=True,
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()
