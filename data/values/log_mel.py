"""Sound as a picture: the logarithm of its mel spectrogram, with public constants only.

Dimension suffixes: S samples, F frequencies, M mels, T frames.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Self

import torch
from pydantic import Field, model_validator
from torch import Tensor

from conclave.base.frozen import Frozen

FLOOR_DB = -80.0
"""What counts as silence, below a sine of full scale: it is 0 in the picture, and full scale is 1."""


class LogMelConfig(Frozen):
    """How sound becomes a picture [1, mels, frames].

    rate: samples a second. seconds: longer sound is cut, shorter sound followed by silence.
    mels: bands, equally wide on the mel scale, 2595·log10(1 + f/700), from 0 to half the rate.
    fft: samples in one frame. hop: samples from one frame to the next.
    """

    rate: int = Field(ge=1000, le=192_000)
    seconds: float = Field(gt=0.0, le=3600.0)
    mels: int = Field(default=32, ge=1, le=512)
    fft: int = Field(default=256, ge=16, le=65_536)
    hop: int = Field(default=128, ge=1, le=65_536)

    @model_validator(mode="after")
    def _frames_and_bands_exist(self) -> Self:
        if self.samples < self.fft:
            raise ValueError(f"fft is {self.fft}, must be at most the {self.samples} samples of {self.seconds} seconds")
        if self.frames > 65_536:
            raise ValueError(f"hop is {self.hop}, must give at most 65536 frames, not {self.frames}")
        if not bool((mel_bands(self.rate, self.fft, self.mels) > 0).any(dim=1).all()):
            raise ValueError(f"mels is {self.mels}, must be fewer: a band would lie between two frequencies")
        return self

    @property
    def samples(self) -> int:
        """Samples of one record."""
        return round(self.rate * self.seconds)

    @property
    def frames(self) -> int:
        """Frames of one record."""
        return 1 + (self.samples - self.fft) // self.hop


@lru_cache(maxsize=16)
def mel_bands(rate: int, fft: int, mels: int) -> Tensor:
    """Return the weights of every frequency in every band, float32 [M, F]: triangles that overlap by half."""
    top = 2595.0 * torch.log10(torch.tensor(1.0 + rate / 2 / 700.0, dtype=torch.float64))
    corner = 700.0 * (10.0 ** (torch.linspace(0.0, 1.0, mels + 2, dtype=torch.float64) * top / 2595.0) - 1.0)
    frequency_F = torch.linspace(0.0, rate / 2, fft // 2 + 1, dtype=torch.float64)
    left, middle, right = (corner[i : i + mels].unsqueeze(1) for i in range(3))
    rising, falling = (frequency_F - left) / (middle - left), (right - frequency_F) / (right - middle)
    return torch.minimum(rising, falling).clamp(min=0.0).to(torch.float32)


def log_mel(sound_S: Tensor, config: LogMelConfig) -> Tensor:
    """Return the picture of a sound, float32 [1, M, T] in [0, 1].

    Args:
        sound_S: float32 in [−1, 1], ``config.samples`` of them.
    """
    window_S = torch.hann_window(config.fft)
    spectrum_FT = torch.stft(sound_S, config.fft, config.hop, window=window_S, center=False, return_complex=True)
    spectrum_FT = spectrum_FT * (2.0 / float(window_S.sum()))  # a sine of full scale has power 1
    power_MT = mel_bands(config.rate, config.fft, config.mels) @ spectrum_FT.abs().square()
    decibel_MT = 10.0 * power_MT.clamp(min=10.0 ** (FLOOR_DB / 10.0)).log10()
    return (1.0 - decibel_MT / FLOOR_DB).clamp(0.0, 1.0).unsqueeze(0)
