"""What a node's owner lets run: approved plans, in its hours, unless paused. Files that the owner's commands change."""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from datetime import datetime, time
from pathlib import Path
from typing import NoReturn

from conclave.base.errors import BadInputError
from conclave.base.reading import parse_json
from conclave.base.whole_file import new_file, write_atomically
from conclave.clients.operations_config import within
from conclave.privacy.accounting.mechanisms import ExponentialChoice
from conclave.protocol.charges import charges_of
from conclave.protocol.messages import ProtocolError
from conclave.protocol.plan import Plan

_MOST_WAITING = 100
"""A server that asks for ever new plans fills no disk."""


@dataclass(frozen=True)
class WaitingPlan:
    """A plan that a server asked for and nobody has approved. scenario: its name, as the server states it."""

    hash: str
    scenario: str
    plan: Plan


def released(plan: Plan) -> list[str]:
    """Name everything that a plan asks a node to release, including what other ledgers pay for."""
    planned = charges_of(plan)
    said = list(planned["train"].releases)
    if isinstance(choice := planned["choose"].mechanism if "choose" in planned else None, ExponentialChoice):
        said.append(f"choices of experts (epsilon {choice.epsilon:g} each)")
    if "evaluate" in planned:
        said.append(f"metrics of held-out units ({planned['evaluate'].count} times, from their own budget)")
    return said


class Approvals:
    """The folder ``plans`` in a node's state: ``HASH.waiting`` and ``HASH.approved``, and ``paused``.

    An approval is for one run, the first that draws on it; its name goes to ``HASH-1.run``. Approved once more, a
    plan may have a second run (``HASH-2.run``), and so on. A server names its runs as it likes, and could otherwise run
    an approved plan until the budget is gone.

    hours: outside them the node is paused; see :class:`conclave.clients.operations_config.LimitsConfig`.
    now: the local time of day.
    """

    def __init__(
        self, folder: Path, *, hours: str | None = None, now: Callable[[], time] = lambda: datetime.now().time()
    ) -> None:
        self._folder = folder
        self._hours = hours
        self._now = now

    def check(self, plan: Plan, scenario: str, *, needed: bool, run_id: str | None = None) -> None:
        """Let an approved plan pass, and note another for the owner.

        Args:
            needed: whether the policy asks for an approval at all; a paused node refuses either way.
            run_id: the run that asks; None if any run may.

        Raises:
            ProtocolError: ``paused``, or ``awaiting-approval``.
        """
        if self.paused:
            raise ProtocolError("paused", "the owner paused this node")
        if not self.open:
            raise ProtocolError("paused", f"it is outside of limits.hours, {self._hours}")
        if not needed:
            return
        allowed, runs = self._allowed(plan.hash), self.runs(plan.hash)
        if not (len(runs) < allowed or run_id in runs or (run_id is None and allowed)):
            self._ask_owner(plan, scenario)

    def begin(self, plan: Plan, scenario: str, run_id: str) -> None:
        """Note durably that a run is about to draw on its plan's approval.

        Raises:
            ProtocolError: ``awaiting-approval``: other runs drew on all there are.
        """
        for number in range(1, self._allowed(plan.hash) + 1):
            place = self._run(plan.hash, number)
            with suppress(FileExistsError), new_file(place, mode=0o600) as file:  # refused where another run took it
                file.write(run_id.encode())
            if place.read_text() == run_id:
                return
        self._ask_owner(plan, scenario)

    def _ask_owner(self, plan: Plan, scenario: str) -> NoReturn:
        waiting = self._file(plan.hash, "waiting")
        if not waiting.exists() and self.count_waiting() < _MOST_WAITING:
            self._folder.mkdir(parents=True, exist_ok=True, mode=0o700)
            document = {"scenario": scenario, "plan": json.loads(plan.model_dump_json())}
            write_atomically(waiting, json.dumps(document).encode(), mode=0o600)
        raise ProtocolError(
            "awaiting-approval", f"plan {plan.hash} of scenario {scenario!r} is not approved for this run"
        )

    def _allowed(self, plan_hash: str) -> int:
        """Return how many runs of a plan the owner approved."""
        path = self._file(plan_hash, "approved")
        try:
            return int(parse_json(path.read_bytes()).get("runs", 1))
        except FileNotFoundError:
            return 0
        except (ValueError, TypeError, AttributeError):
            return 1  # as a release wrote it that did not count

    def runs(self, plan_hash: str) -> list[str]:
        """Return the runs that drew on a plan's approvals."""
        return [path.read_text() for path in sorted(self._folder.glob(f"{plan_hash}-*.run"))]

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
                document = parse_json(path.read_bytes())
                plan = Plan.model_validate_json(json.dumps(document["plan"]))
                scenario = str(document["scenario"])
            except (OSError, ValueError, KeyError, TypeError) as error:
                raise BadInputError(
                    f"{path}: damaged, must hold a plan; delete it, the server will ask again"
                ) from error
            found.append(WaitingPlan(plan.hash, scenario, plan))
        return found

    def approve(self, prefix: str) -> WaitingPlan:
        """Approve the waiting plan whose hash begins like this, for one run more.

        Raises:
            BadInputError: no plan's hash does, or several plans' hashes do.
        """
        found = [waiting for waiting in self.waiting() if waiting.hash.startswith(prefix)]
        if len(found) != 1:
            raise BadInputError(f"plan {prefix}: {len(found)} waiting plans begin like this, must be one")
        waiting = self._file(found[0].hash, "waiting")
        document = json.loads(waiting.read_bytes()) | {"runs": self._allowed(found[0].hash) + 1}
        write_atomically(self._file(found[0].hash, "approved"), json.dumps(document).encode(), mode=0o600)
        waiting.unlink()
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

    def _run(self, plan_hash: str, number: int) -> Path:
        return self._folder / f"{plan_hash}-{number}.run"
