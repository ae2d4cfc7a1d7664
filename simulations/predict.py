"""Predict with a saved model."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor

from data.config import DataConfig
from data.sources import load as load_data
from model import BadInputError, Network, load
from model.config import BytesConfig, ImageConfig, TableConfig

_LARGEST_SIDE = 8192
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
        source: for images a file, a ``.npy`` array [H, W] or [C, H, W] with values in [0, 1], or ``digits:N`` or
            ``mnist:N`` for the N-th public test record; for text the prompt; for tables the row's standardised
            numbers, separated by commas.
        max_bytes: text only, how many bytes to generate, 1 to 65,536.
        temperature: text only, above 0: the scores are divided by it before drawing.
        seed: text only, fixes the draw.

    Raises:
        BadInputError: the model or the input cannot be used.
    """
    folder = model / "model" if (model / "model").is_dir() else model
    network = load(folder)
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
    generator = torch.Generator().manual_seed(seed)
    text = list(prompt.encode())
    start = len(text)
    with torch.inference_mode():
        for _ in range(max_bytes):
            context_BT = torch.tensor([text[-window:]], dtype=torch.uint8)
            scores_V = network({"text": context_BT}).scores[0, -1]
            probabilities_V = (scores_V / temperature).softmax(dim=0)
            text.append(int(torch.multinomial(probabilities_V, 1, generator=generator)))
    return Continuation(bytes(text[start:]).decode(errors="replace"), max_bytes)


def _read_row(source: str, config: TableConfig) -> Tensor:
    try:
        row_F = torch.tensor([float(value) for value in source.split(",")], dtype=torch.float32)
    except ValueError:
        row_F = torch.empty(0)
    if len(row_F) != config.features or not row_F.isfinite().all():
        raise BadInputError(f"the input must be {config.features} finite numbers, separated by commas")
    return row_F


def _read(source: str, config: ImageConfig) -> tuple[Tensor, int | None]:
    name, colon, number = source.partition(":")
    if colon and name in _TESTS:
        return _read_test_record(name, number)
    path = Path(source)
    if not path.is_file():
        raise BadInputError(f"{source}: no such file, must be an image, a .npy array, digits:N or mnist:N")
    array = _read_npy(path) if path.suffix == ".npy" else _read_image(path, config)
    image_CHW = torch.from_numpy(array)
    return (image_CHW.unsqueeze(0) if image_CHW.ndim == 2 else image_CHW), None


def _read_test_record(name: str, number: str) -> tuple[Tensor, int]:
    test = load_data(_TESTS[name]).test
    if not number.isdecimal() or int(number) >= len(test["label"]):
        raise BadInputError(f"{name}:{number}: must be {name}:0 to {name}:{len(test['label']) - 1}")
    return test["image"][int(number)], int(test["label"][int(number)])


def _read_npy(path: Path) -> np.ndarray:
    try:
        array = np.load(path, allow_pickle=False)
    except (OSError, ValueError) as error:
        raise BadInputError(f"{path}: cannot be read, must be a .npy array of numbers") from error
    if array.dtype.kind not in "fiu" or array.ndim not in (2, 3) or not np.isfinite(array).all():
        raise BadInputError(f"{path}: must be a finite array [H, W] or [C, H, W] of numbers")
    return np.asarray(array, dtype=np.float32)


def _read_image(path: Path, config: ImageConfig) -> np.ndarray:
    try:
        with Image.open(path) as image:
            if max(image.size) > _LARGEST_SIDE:
                raise BadInputError(f"{path}: {image.size} pixels, each side must be at most {_LARGEST_SIDE}")
            resized = image.convert("L" if config.channels == 1 else "RGB").resize((config.width, config.height))
    except (OSError, UnidentifiedImageError, Image.DecompressionBombError) as error:
        raise BadInputError(f"{path}: cannot be read, must be an image file") from error
    array = np.asarray(resized, dtype=np.float32) / 255.0
    return array if array.ndim == 2 else array.transpose(2, 0, 1)
