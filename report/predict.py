"""Predict with a saved model."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from conclave.base.errors import BadInputError
from conclave.base.reading import read_content
from conclave.data.config import DataConfig
from conclave.data.formats.npz_file import array_from
from conclave.data.sources import load as load_data
from conclave.data.values.config import PictureConfig
from conclave.data.values.kinds import number_of
from conclave.data.values.picture import picture_from, picture_of_array
from conclave.data.values.rows import BadValueError
from conclave.model.encoders.config import BytesConfig, ImageConfig, TableConfig
from conclave.model.network import Network
from conclave.model.store import load

_MOST_BYTES = 1 << 30
_TESTS = {"digits": DataConfig(source="digits"), "mnist": DataConfig(source="mnist", test_records=10_000)}


@dataclass(frozen=True)
class Prediction:
    """The most likely class, its probability, and the probabilities of all classes."""

    label: int
    probability: float
    probabilities: list[float]
    truth: int | None


@dataclass(frozen=True)
class Continuation:
    """Generated text; bytes that are not UTF-8 show as replacement characters."""

    text: str
    bytes_generated: int


def predict(
    model: Path, source: str, *, max_bytes: int = 128, temperature: float = 0.7, seed: int = 0
) -> Prediction | Continuation:
    """Classify an input, or continue a text, as the model's task is.

    Args:
        model: a model folder, or a run directory.
        source: for images a picture or a ``.npy`` array [H, W] or [C, H, W], read as training reads those of private
            data (see :mod:`conclave.data.values.picture`), or ``digits:N`` or ``mnist:N`` for the N-th public test
            record; for text the prompt; for tables the row's standardised numbers, separated by commas.
        max_bytes: text only, how many bytes to generate, 1 to 65,536.
        temperature: text only, above 0: the scores are divided by it before drawing.
        seed: text only, fixes the draw.

    Raises:
        BadInputError: the model or the input cannot be used.
    """
    network = load(model)
    encoder = network.config.encoder
    if isinstance(encoder, BytesConfig):
        return _continue(network, source, encoder.window, max_bytes, temperature, seed)
    values, truth = (_read_row(source, encoder), None) if isinstance(encoder, TableConfig) else _read(source, encoder)
    with torch.inference_mode():
        probabilities = network({encoder.modality: values.unsqueeze(0)}).scores.softmax(dim=1)[0]
    label = int(probabilities.argmax())
    return Prediction(label, float(probabilities[label]), probabilities.tolist(), truth)


def _continue(
    network: Network, prompt: str, window: int, max_bytes: int, temperature: float, seed: int
) -> Continuation:
    """Draw byte after byte, each from the scores after the last ``window`` bytes."""
    if not prompt:
        raise BadInputError("the prompt is empty, must be at least one character")
    if not 1 <= max_bytes <= 65_536:
        raise BadInputError(f"--max-bytes is {max_bytes}, must be 1 to 65536")
    if not (math.isfinite(temperature) and temperature > 0):
        raise BadInputError(f"--temperature is {temperature:g}, must be above 0")
    if not -(2**63) <= seed < 2**64:
        raise BadInputError(f"--seed is {seed}, must be from -2^63 to 2^64 - 1")
    generator = torch.Generator().manual_seed(seed)
    text = list(prompt.encode())
    start = len(text)
    with torch.inference_mode():
        for _ in range(max_bytes):
            context_BT = torch.tensor([text[-window:]], dtype=torch.uint8)
            scores_V = network({"text": context_BT}).scores[0, -1].double()
            below_V = scores_V - scores_V.max()  # the best stays 0, however small a number divides it
            probabilities_V = (below_V / temperature).softmax(dim=0)
            text.append(int(torch.multinomial(probabilities_V, 1, generator=generator)))
    return Continuation(bytes(text[start:]).decode(errors="replace"), max_bytes)


def _read_row(source: str, config: TableConfig) -> Tensor:
    refusal = f"the input must be {config.features} finite numbers, separated by commas"
    try:
        values = [number_of(value, frozenset()) for value in source.split(",")]
    except BadValueError as error:
        raise BadInputError(refusal) from error
    if len(values) != config.features or None in values:
        raise BadInputError(refusal)
    row_F = torch.tensor(values, dtype=torch.float64).float()
    if not row_F.isfinite().all():
        raise BadInputError(refusal)
    return row_F


def _read(source: str, config: ImageConfig) -> tuple[Tensor, int | None]:
    name, colon, number = source.partition(":")
    if colon and name in _TESTS:
        image_CHW, truth = _read_test_record(name, number)
    else:
        image_CHW, truth = _read_file(Path(source), config), None
    shape, wanted = list(image_CHW.shape), [config.channels, config.height, config.width]
    if shape != wanted:
        raise BadInputError(f"{source}: has the shape {shape}, must be {wanted} for this model")
    return image_CHW, truth


def _read_file(path: Path, config: ImageConfig) -> Tensor:
    if not path.is_file():
        found = "is a folder" if path.is_dir() else "no such file"
        raise BadInputError(f"{path}: {found}, must be a picture, a .npy array, digits:N or mnist:N")
    array = _read_npy(path) if path.suffix.lower() == ".npy" else _read_image(path, config)
    return torch.from_numpy(array if array.ndim == 3 else array[np.newaxis])


def _read_test_record(name: str, number: str) -> tuple[Tensor, int]:
    test = load_data(_TESTS[name]).test
    last = len(test["label"]) - 1
    if not (number.isascii() and number.isdecimal() and len(number) <= len(str(last)) and int(number) <= last):
        raise BadInputError(f"{name}:{number}: must be {name}:0 to {name}:{last}")
    return test["image"][int(number)], int(test["label"][int(number)])


def _read_npy(path: Path) -> np.ndarray:
    """Return an array as training reads those of ``.npz`` files, float32 [H, W] or [C, H, W] in [0, 1]."""
    try:
        array = array_from(_content(path))
    except BadValueError as error:
        raise BadInputError(f"{path}: cannot be read, {error}") from error
    if array.ndim not in (2, 3):
        raise BadInputError(f"{path}: has the shape {list(array.shape)}, must be [H, W] or [C, H, W]")
    try:
        return picture_of_array(array)
    except BadValueError as error:
        raise BadInputError(f"{path}: {error}") from error


def _read_image(path: Path, config: ImageConfig) -> np.ndarray:
    """Return a picture as training reads those of private data, float32 [C, H, W] in [0, 1]."""
    if config.channels not in (1, 3):
        raise BadInputError(f"{path}: is no array, must be one (.npy) for a model of {config.channels} channels")
    channels: Literal[1, 3] = 1 if config.channels == 1 else 3
    as_trained = PictureConfig(height=config.height, width=config.width, channels=channels)
    try:
        return picture_from(_content(path), as_trained)
    except BadValueError as error:
        raise BadInputError(f"{path}: cannot be read, {error}") from error


def _content(path: Path) -> bytes:
    return read_content(path, f"{path}: cannot be read, must be an input of the model's", _MOST_BYTES)
