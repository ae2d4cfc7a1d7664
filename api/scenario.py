"""Scenarios from Python."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Self

from conclave.server.scenario import Scenario as ServerScenario
from conclave.server.scenario import parse_scenario, read_scenario
from conclave.simulations.shipped import find


class Scenario(ServerScenario):
    """Everything about a federation: model, data, partition, privacy, training, rounds. It never changes.

    >>> import conclave
    >>> scenario = conclave.Scenario.read("digits", seed=3, federation={"rounds": 5})
    >>> scenario.seed, scenario.federation.rounds, scenario.privacy.epsilon
    (3, 5, 8.0)
    """

    @classmethod
    def read(cls, source: str | os.PathLike[str], **overrides: Any) -> Self:
        """Read a scenario that comes with Conclave (``"digits"``) or a TOML file.

        Args:
            source: a shipped name, or a path.
            overrides: keys of the scenario and their values. Of a table, those that are given: ``privacy={"epsilon":
                3}`` leaves the others. A dotted key, as for ``--set``, is given as ``**{"privacy.epsilon": 3}``.

        Raises:
            BadInputError: one sentence that names the file, the key, the value and what is allowed.
        """
        return cls._of(read_scenario(find(os.fspath(source)), dict(_dotted(overrides))))

    def replace(self, **overrides: Any) -> Self:
        """Return the same scenario with other values.

        >>> import conclave
        >>> tight = conclave.Scenario.read("digits").replace(privacy={"epsilon": 1.0})
        >>> tight.privacy.epsilon, tight.privacy.delta
        (1.0, 1e-05)

        Args:
            overrides: as of :meth:`read`.

        Raises:
            BadInputError: as :meth:`read`.
        """
        where, changes = f"scenario {self.name}", dict(_dotted(overrides))
        return self._of(parse_scenario(self.to_toml(), where=where, overrides=changes))

    @classmethod
    def _of(cls, found: ServerScenario) -> Self:
        return cls.model_validate(dict(found))


def _dotted(overrides: Mapping[str, Any], above: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in overrides.items():
        if isinstance(value, Mapping) and value:
            yield from _dotted(value, f"{above}{key}.")
        else:
            yield f"{above}{key}", str(value) if isinstance(value, Path) else value
