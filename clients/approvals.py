"""Which plans a node's owner has approved, and whether the node is paused: files that the owner's commands change."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from clients.protocol import Plan, ProtocolError
from model.errors import BadInputError
from model.store import write_atomically

_MOST_WAITING = 100
"""A server that asks for ever new plans fills no disk."""


@dataclass(frozen=True)
class WaitingPlan:
    """A plan that a server asked for and nobody approved. scenario: its name, the server's word."""

    hash: str
    scenario: str
    plan: Plan


class Approvals:
    """The folder ``plans`` in a node's state: ``HASH.waiting`` and ``HASH.approved``, and ``paused``."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def check(self, plan: Plan, scenario: str, *, needed: bool) -> None:
        """Let an approved plan pass, and note another for the owner.

        Args:
            needed: whether the policy asks for an approval at all; a paused node refuses either way.

        Raises:
            ProtocolError: ``paused``, or ``awaiting-approval``.
        """
        if (self._folder / "paused").exists():
            raise ProtocolError("paused", "the owner paused this node")
        if not needed or self._file(plan.hash, "approved").exists():
            return
        waiting = self._file(plan.hash, "waiting")
        if not waiting.exists() and len(list(self._folder.glob("*.waiting"))) < _MOST_WAITING:
            self._folder.mkdir(parents=True, exist_ok=True, mode=0o700)
            document = {"scenario": scenario, "plan": json.loads(plan.model_dump_json())}
            write_atomically(waiting, json.dumps(document).encode(), mode=0o600)
        raise ProtocolError("awaiting-approval", f"plan {plan.hash} of scenario {scenario!r} is not approved")

    def waiting(self) -> list[WaitingPlan]:
        """Return the plans that wait, by hash.

        Raises:
            BadInputError: a file is damaged.
        """
        found = []
        for path in sorted(self._folder.glob("*.waiting")):
            try:
                document = json.loads(path.read_bytes())
                plan = Plan.model_validate_json(json.dumps(document["plan"]))
                scenario = str(document["scenario"])
            except (OSError, ValueError, KeyError, TypeError) as error:
                raise BadInputError(
                    f"{path}: damaged, must hold a plan; delete it, the server will ask again"
                ) from error
            found.append(WaitingPlan(plan.hash, scenario, plan))
        return found

    def approve(self, prefix: str) -> WaitingPlan:
        """Approve the waiting plan whose hash begins like this.

        Raises:
            BadInputError: none does, or several.
        """
        found = [waiting for waiting in self.waiting() if waiting.hash.startswith(prefix)]
        if len(found) != 1:
            raise BadInputError(f"plan {prefix}: {len(found)} waiting plans begin like this, must be one")
        self._file(found[0].hash, "waiting").replace(self._file(found[0].hash, "approved"))
        return found[0]

    def pause(self) -> None:
        """Refuse everything from now on, until :meth:`resume`."""
        self._folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        (self._folder / "paused").touch(mode=0o600)

    def resume(self) -> None:
        """Answer again."""
        (self._folder / "paused").unlink(missing_ok=True)

    def _file(self, plan_hash: str, state: str) -> Path:
        return self._folder / f"{plan_hash}.{state}"
