"""What a node's owner lets run: approved plans, in its hours, unless paused. Files that the owner's commands change."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime, time
from pathlib import Path

from clients.hours import within
from clients.protocol import Plan, ProtocolError
from model.errors import BadInputError
from model.store import write_atomically
from privacy.load_histogram import release_shares

_MOST_WAITING = 100
"""A server that asks for ever new plans fills no disk."""


@dataclass(frozen=True)
class WaitingPlan:
    """A plan that a server asked for and nobody approved. scenario: its name, the server's word."""

    hash: str
    scenario: str
    plan: Plan


def released(plan: Plan) -> list[str]:
    """Say everything that a plan asks a node to let out, what other ledgers pay for too."""
    said = list(release_shares(plan.load_share))
    if plan.affinity is not None:
        said.append(f"choices of experts (epsilon {plan.affinity.epsilon:g} each)")
    if plan.evaluation is not None:
        said.append(f"metrics of held-out units ({plan.evaluation.count(plan.rounds)} times, from their own budget)")
    return said


class Approvals:
    """The folder ``plans`` in a node's state: ``HASH.waiting`` and ``HASH.approved``, and ``paused``.

    hours: outside of them the node is paused; see :class:`clients.operations_config.LimitsConfig`.
    now: the local time of day.
    """

    def __init__(
        self, folder: Path, *, hours: str | None = None, now: Callable[[], time] = lambda: datetime.now().time()
    ) -> None:
        self._folder = folder
        self._hours = hours
        self._now = now

    def check(self, plan: Plan, scenario: str, *, needed: bool) -> None:
        """Let an approved plan pass, and note another for the owner.

        Args:
            needed: whether the policy asks for an approval at all; a paused node refuses either way.

        Raises:
            ProtocolError: ``paused``, or ``awaiting-approval``.
        """
        if self.paused:
            raise ProtocolError("paused", "the owner paused this node")
        if not self.open:
            raise ProtocolError("paused", f"it is outside of limits.hours, {self._hours}")
        if not needed or self._file(plan.hash, "approved").exists():
            return
        waiting = self._file(plan.hash, "waiting")
        if not waiting.exists() and self.count_waiting() < _MOST_WAITING:
            self._folder.mkdir(parents=True, exist_ok=True, mode=0o700)
            document = {"scenario": scenario, "plan": json.loads(plan.model_dump_json())}
            write_atomically(waiting, json.dumps(document).encode(), mode=0o600)
        raise ProtocolError("awaiting-approval", f"plan {plan.hash} of scenario {scenario!r} is not approved")

    @property
    def paused(self) -> bool:
        """Whether the owner paused the node."""
        return (self._folder / "paused").exists()

    @property
    def open(self) -> bool:
        """Whether it is one of the node's hours."""
        return self._hours is None or within(self._hours, self._now())

    def count_waiting(self) -> int:
        """Return how many plans wait."""
        return len(list(self._folder.glob("*.waiting")))

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
