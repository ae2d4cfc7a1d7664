"""How a ledger spells a mechanism: canonical JSON from which anyone can recompute its cost."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping

from conclave.base.canonical import canonical_json, decimal
from conclave.base.errors import BadInputError
from conclave.privacy.accounting.mechanisms import (
    ExponentialChoice,
    Mechanism,
    SampledGaussian,
    accountable,
    joint_noise,
)

NUMERIC_LEVELS = ("strict", "fast", "uncertified")


def spell(mechanism: Mechanism | None, *, clip: float, numeric: str, parts: Mapping[str, float]) -> str:
    """Return the JSON of a mechanism; None is training without privacy.

    Args:
        clip: the bound of one unit's contribution, where there is one.
        numeric: the level at which the bound holds.
        parts: σ of each release where several are made from one Poisson sample. They are one event, charged with the
            σ of all together.

    Raises:
        BadInputError: the mechanism claims more noise than its parts have together, or :func:`parse` would refuse it.
    """
    if mechanism is None:
        return '{"kind":"none"}'
    if not accountable(mechanism):
        raise BadInputError(f"{mechanism}: beyond what accountants can be trusted with, must not be charged")
    if isinstance(mechanism, ExponentialChoice):
        document: dict[str, object] = {
            "kind": "exponential", "epsilon": decimal(mechanism.epsilon), "choices": mechanism.choices,
        }  # fmt: skip
        return canonical_json(document).decode()
    document = {
        "kind": "gaussian",
        "sigma": decimal(mechanism.noise_multiplier),
        "clip": decimal(clip),
        "q": decimal(mechanism.sampling_rate),
        "steps": mechanism.steps,
        "sampler": "poisson",
        "numeric": numeric,
    }
    if parts:
        _check_parts(mechanism, parts)
        document["parts"] = {name: decimal(noise) for name, noise in parts.items()}
    return canonical_json(document).decode()


def parse(text: str) -> Mechanism | None:
    """Read a mechanism; None is a charge without privacy.

    Raises:
        BadInputError: not a mechanism that this Conclave knows, or one that claims more noise than its parts have.
    """
    try:
        document = json.loads(text)
        if document["kind"] == "none":
            return None
        if document["kind"] == "exponential":
            choice = ExponentialChoice(epsilon=float(document["epsilon"]), choices=int(document["choices"]))
            if not accountable(choice):
                raise ValueError
            return choice
        if document["kind"] != "gaussian" or document["sampler"] != "poisson":
            raise ValueError
        if document["numeric"] not in NUMERIC_LEVELS:
            raise ValueError
        mechanism = SampledGaussian(
            sampling_rate=float(document["q"]),
            noise_multiplier=float(document["sigma"]),
            steps=int(document["steps"]),
        )
        if not accountable(mechanism):
            raise ValueError
        parts = {str(name): float(noise) for name, noise in document.get("parts", {}).items()}
    except (ValueError, TypeError, KeyError, AttributeError, OverflowError, RecursionError) as error:
        raise BadInputError(
            "its mechanism cannot be read, must be a Poisson-sampled gaussian, a choice, or none"
        ) from error
    if parts:
        _check_parts(mechanism, parts)
    return mechanism


def parts_of(text: str) -> dict[str, float]:
    """Return the parts of a mechanism that :func:`parse` accepts: name → σ; empty where it names none."""
    return {str(name): float(noise) for name, noise in json.loads(text).get("parts", {}).items()}


def check_named(mechanism: Mechanism | None, releases: Collection[str], parts: Collection[str]) -> None:
    """Refuse several releases from one Poisson sample of which not each is named with a σ.

    Without that nobody could tell that the charge covers them all.

    Raises:
        BadInputError: a release is not among the parts, or a part is not released.
    """
    if isinstance(mechanism, SampledGaussian) and len(releases) > 1 and set(releases) != set(parts):
        raise BadInputError(
            f"its releases are {', '.join(releases)}, must each be a part with a sigma: what is released from one "
            "sample is one event"
        )


def _check_parts(mechanism: SampledGaussian, parts: Mapping[str, float]) -> None:
    together = joint_noise(parts.values())
    if mechanism.noise_multiplier > together:
        raise BadInputError(
            f"its sigma is {mechanism.noise_multiplier}, must be at most {together}: what is released from one sample "
            "is one event"
        )
