"""Whether a budget (ε, δ) protects anybody, for so many units: what is refused, and what its owner should be told.

δ bounds the chance that the ε-guarantee does not hold. A mechanism that publishes each unit whole with probability δ is
(0, δ)-DP: with n units it gives n·δ of them away on average. So δ of 1/n and more protects nobody in particular.
"""

from __future__ import annotations

from conclave.base.errors import BadInputError

_WELL_BELOW = 10
_PROTECTS_LITTLE = 20.0
"""At this ε what is observed may be e^20, half a billion times, likelier with a unit than without it."""


def check_delta(delta: float, units: int, *, where: str) -> None:
    """Refuse a δ that allows giving a unit away.

    Args:
        units: how many there are, by public declaration.
        where: names the δ in the error.

    Raises:
        BadInputError: δ is not below 1 / units.
    """
    if delta >= 1.0 / units:
        raise BadInputError(
            f"{where} is {delta:g}, must be below 1 / units, which is {1.0 / units:.3g} for {units}, and should be "
            f"at most a tenth of that: it allows giving {delta * units:.3g} units away whole"
        )


def doubts(epsilon: float, delta: float, units: int) -> list[str]:
    """Return one sentence for each reason why a budget that is allowed protects little."""
    found = []
    if delta * units * _WELL_BELOW > 1.0 + 1e-9:
        found.append(
            f"delta {delta:g} is not well below 1 / units: for {units} units it should be at most "
            f"{1.0 / (_WELL_BELOW * units):.3g}"
        )
    if epsilon > _PROTECTS_LITTLE:
        found.append(f"epsilon {epsilon:g} protects next to nothing: it should be at most {_PROTECTS_LITTLE:g}")
    return found
