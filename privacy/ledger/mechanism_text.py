"""What an entry says in ``mechanism``: canonical JSON that is hashed, spelled and read here alone.

A charge says enough for anyone to recompute its cost. Other entries say what happened: what a plan may draw, and its
end; another key; a start from a copy; a newer format.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

from conclave.base.canonical import canonical_json, decimal
from conclave.base.errors import BadInputError
from conclave.privacy.accounting.mechanisms import (
    ExponentialChoice,
    Mechanism,
    SampledGaussian,
    accountable,
    joint_noise,
)
from conclave.privacy.ledger.heads import KeyRotation

NUMERIC_LEVELS = ("strict", "fast", "uncertified")

PLAN_END = '{"kind":"plan-end"}'
"""What the end of a plan says."""

PlannedMechanism = tuple[str, int]
"""The spelling of a mechanism, and how many charges of it."""


def spell(mechanism: Mechanism | None, *, clip: float, numeric: str, parts: Mapping[str, float]) -> str:
    """Return the JSON of a mechanism; None is training without privacy.

    Args:
        clip: the bound of one unit's contribution, if there is one.
        numeric: the level at which the bound holds.
        parts: σ of each release if several are made from one Poisson sample. They are one event, charged with the
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


@dataclass(frozen=True)
class Charged:
    """What a charge says. mechanism: None without privacy. parts: name → σ, where one sample makes several releases."""

    mechanism: Mechanism | None
    parts: Mapping[str, float] = field(default_factory=dict)


def parse(text: str) -> Charged:
    """Read a charge.

    Raises:
        BadInputError: not a mechanism that this Conclave knows, or one that claims more noise than its parts have.
    """
    try:
        document = json.loads(text)
        if document["kind"] == "none":
            return Charged(None)
        if document["kind"] == "exponential":
            choice = ExponentialChoice(epsilon=float(document["epsilon"]), choices=int(document["choices"]))
            if not accountable(choice):
                raise ValueError
            return Charged(choice)
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
    return Charged(mechanism, parts)


def check_named(mechanism: Mechanism | None, releases: Collection[str], parts: Collection[str]) -> None:
    """Refuse several releases from one Poisson sample unless each is named with a σ.

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


def spell_plan(planned: Sequence[PlannedMechanism], units: str) -> str:
    """Return the JSON of an admission.

    Args:
        planned: at least one; the first is what every round is charged as.
        units: RDP units set aside for all of it.
    """
    (mechanism, charges), *also = planned
    document: dict[str, object] = {"kind": "plan", "charges": charges, "mechanism": mechanism, "units": units}
    if also:
        document["also"] = [{"charges": count, "mechanism": other} for other, count in also]
    return canonical_json(document).decode()


@dataclass(frozen=True)
class SetAside:
    """What an admission says. units: RDP set aside for all that the plan may draw. planned: that, first of every round.

    What is planned stays as it is spelled: a charge draws on it where it is spelled alike.
    """

    units: int
    planned: tuple[PlannedMechanism, ...]

    @property
    def most(self) -> Counter[str]:
        """How many charges of each spelling the plan may draw."""
        most: Counter[str] = Counter()
        for mechanism, count in self.planned:
            most[mechanism] += count
        return most


def parse_plan(text: str) -> SetAside:
    """Read an admission.

    Raises:
        ValueError: no ledger writes such a one.
    """
    with _strictly():
        document = json.loads(text)
        items = [document, *document.get("also", ())]
        planned = tuple((str(item["mechanism"]), int(item["charges"])) for item in items)
        units = int(document["units"])
    if units < 0 or any(count < 0 for _, count in planned):
        raise ValueError("less than nothing")
    return SetAside(units, planned)


def spell_rotation(rotation: KeyRotation) -> str:
    """Return the JSON of a change of keys."""
    return canonical_json({"kind": "key-rotation", **rotation.model_dump()}).decode()


def parse_rotation(text: str) -> KeyRotation:
    """Read a change of keys; whether it holds is another question.

    Raises:
        ValidationError: a key or a signature cannot be one.
        ValueError: no ledger writes such a one.
    """
    with _strictly():
        document = json.loads(text)
        del document["kind"]
        return KeyRotation.model_validate(document)


@dataclass(frozen=True)
class Restored:
    """What a start from a copy says. machine: the id of the one it goes on at. proven: that nothing is missing."""

    machine: str
    proven: bool

    def spell(self) -> str:
        """Return the JSON."""
        return canonical_json({"kind": "restore", "machine": self.machine, "proven": self.proven}).decode()

    @classmethod
    def parse(cls, text: str) -> Restored:
        """Read it; anything but true is no proof.

        Raises:
            ValueError: no ledger writes such a one.
        """
        with _strictly():
            document = json.loads(text)
            return cls(str(document["machine"]), document["proven"] is True)


def spell_migration(found: int, now: int) -> str:
    """Return the JSON of a conversion from an older format version."""
    return canonical_json({"kind": "migration", "from": found, "to": now}).decode()


@contextmanager
def _strictly() -> Iterator[None]:
    """Let whatever is wrong with a text be a ValueError."""
    try:
        yield
    except (TypeError, KeyError, AttributeError, OverflowError, RecursionError) as error:
        raise ValueError("another document than a ledger writes") from error


def fields_of(text: str) -> dict[str, str] | None:
    """Return what a charge's text states, name → value as text, for comparing; None where it is no JSON object.

    The σ of each part has a name of its own.
    """
    try:
        document = json.loads(text)
    except (ValueError, RecursionError):
        return None
    if not isinstance(document, dict):
        return None
    values = {name: str(value) for name, value in document.items() if name != "parts"}
    parts = document.get("parts")
    if isinstance(parts, dict):
        values |= {f"sigma of {name}": str(noise) for name, noise in parts.items()}
    elif parts is not None:
        values["parts"] = str(parts)
    return values
