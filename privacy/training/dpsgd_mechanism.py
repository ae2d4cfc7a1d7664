"""The public parameters of DP-SGD: what one charge is for, and what follows from them alone."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal, get_args

from conclave.base import allowed
from conclave.base.errors import BadInputError
from conclave.privacy.accounting.mechanisms import LARGEST_NOISE, MOST_STEPS
from conclave.privacy.gradients.clipping import LARGEST_NORM, SMALLEST_CLIP, AdaptiveClip, ClipKind
from conclave.privacy.gradients.physical_batch import MEMORY_BYTES
from conclave.privacy.releases.load_histogram import DELTA, noise_parts
from conclave.privacy.training.config import PrivacyConfig
from conclave.privacy.training.local_optimizers import OptimizerConfig, SgdConfig

Gradients = Literal["bookkeeping", "hooks", "ghost"]
Numeric = Literal["fast", "strict"]


@dataclass(frozen=True, kw_only=True)
class DpSgd:
    """The mechanism of one charge. Every field is public.

    noise_multiplier: σ of everything released from one sample together; the noise added to a clipped sum has standard
        deviation σ·clip where nothing else is. None means no privacy: neither clipping nor noise (simulation only).
    load_share: share of σ⁻² that a histogram of expert loads gets; with 0 there is none.
    declared_size: the public number of units; with ``sampling_rate`` it fixes the divisor.
    records_per_unit: cap on a group's records, where groups are the unit.
    physical_batch: examples processed at once; None takes what fits into ``memory_bytes``. It changes the result by
        rounding only. A group with more records is processed in parts, whose gradients are added up before the clip.
    """

    steps: int
    learning_rate: float
    sampling_rate: float
    clip: float
    noise_multiplier: float | None
    declared_size: int
    gradients: Gradients = "bookkeeping"
    numeric: Numeric = "fast"
    clipping: ClipKind = "flat"
    adaptive: AdaptiveClip = field(default_factory=AdaptiveClip)
    records_per_unit: int | None = None
    optimizer: OptimizerConfig = field(default_factory=SgdConfig)
    physical_batch: int | None = None
    memory_bytes: int = MEMORY_BYTES
    load_share: float = 0.0

    def __post_init__(self) -> None:
        """Check every field.

        Raises:
            BadInputError: a word that is not allowed, a number out of range, or another type.
        """
        allowed.check_word("gradients", self.gradients, get_args(Gradients))
        allowed.check_word("numeric", self.numeric, get_args(Numeric))
        allowed.check_word("clipping", self.clipping, get_args(ClipKind))
        allowed.check_whole("steps", self.steps, 1, MOST_STEPS)
        allowed.check_number("learning_rate", self.learning_rate, 0.0, allowed.FINITE)
        allowed.check_number("sampling_rate", self.sampling_rate, 0.0, 1.0, above=True)
        allowed.check_number("clip", self.clip, SMALLEST_CLIP, LARGEST_NORM)
        if self.noise_multiplier is not None:
            allowed.check_number("noise_multiplier", self.noise_multiplier, 0.0, LARGEST_NOISE, above=True)
        allowed.check_whole("declared_size", self.declared_size, 1, allowed.MOST_UNITS)
        allowed.check_whole("records_per_unit", self.records_per_unit, 1, allowed.MOST_UNITS, may_be_none=True)
        allowed.check_whole("physical_batch", self.physical_batch, 1, allowed.MOST_UNITS, may_be_none=True)
        allowed.check_whole("memory_bytes", self.memory_bytes, 1, allowed.MOST_BYTES)
        allowed.check_number("load_share", self.load_share, 0.0, 1.0)
        if not isinstance(self.adaptive, AdaptiveClip):
            raise BadInputError(
                f"adaptive is {self.adaptive!r}, must be a conclave.privacy.gradients.clipping.AdaptiveClip"
            )

    @classmethod
    def of(
        cls,
        config: PrivacyConfig,
        *,
        steps: int,
        learning_rate: float,
        optimizer: OptimizerConfig,
        noise_multiplier: float | None,
        declared_size: int,
        load_share: float = 0.0,
    ) -> DpSgd:
        """Return the mechanism that a configuration asks for."""
        return cls(
            steps=steps,
            learning_rate=learning_rate,
            optimizer=optimizer,
            noise_multiplier=noise_multiplier,
            declared_size=declared_size,
            load_share=load_share,
            sampling_rate=config.sampling_rate,
            clip=config.clip,
            clipping=config.clipping,
            gradients=config.gradients,
            numeric=config.numeric,
            records_per_unit=config.records_per_unit,
        )

    @property
    def divisor(self) -> float:
        """Expected units in a batch, the public divisor of the sum."""
        return self.sampling_rate * self.declared_size

    @property
    def noise_parts(self) -> dict[str, float]:
        """σ of each release of a step, by name, relative to its own sensitivity: together they have the charged one."""
        if self.noise_multiplier is None:
            raise ValueError("there is no noise without privacy")
        return noise_parts(self.noise_multiplier, self.load_share)

    @property
    def gradient_noise_multiplier(self) -> float:
        """σ of the gradient alone: more than its part if an adaptive clip also counts units."""
        part = self.noise_parts[DELTA]
        if self.clipping == "adaptive":
            return self.adaptive.gradient_noise_multiplier(part, self.divisor)
        return part
