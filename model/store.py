"""Models on disk: ``model.safetensors`` (wire names) beside ``model.json`` (configuration)."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

import torch
from pydantic import ValidationError
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Size, Tensor

from conclave.base.errors import BadInputError
from conclave.base.reading import read_text
from conclave.base.whole_file import write_atomically
from conclave.model import parameters
from conclave.model.building import from_state
from conclave.model.config import ModelConfig
from conclave.model.network import Network


def save_model(folder: Path, config: ModelConfig, wire: Mapping[str, Tensor]) -> None:
    """Write a full model (all experts) to ``folder``, which is created."""
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {name: tensor.detach().contiguous() for name, tensor in wire.items()}
    write_atomically(folder / "model.safetensors", save(tensors))
    write_atomically(folder / "model.json", config.model_dump_json(indent=2).encode())


def _check_belongs(wire: Mapping[str, Tensor], expected: Mapping[str, Size]) -> None:
    if {name: tensor.shape for name, tensor in wire.items()} != expected:
        raise ValueError("other tensors than the configuration describes")
    if not all(tensor.dtype == torch.float32 and bool(tensor.isfinite().all()) for tensor in wire.values()):
        raise ValueError("tensors must be finite and float32")


def load(folder: str | os.PathLike[str]) -> Network:
    """Load a full model, in evaluation mode.

    >>> import conclave
    >>> run = conclave.simulate("digits", partition={"nodes": 2}, federation={"rounds": 1}, out="runs/model")
    >>> network = conclave.load("runs/model")
    >>> network.config.preset, network.training
    ('moe', False)

    Args:
        folder: of a saved model (``model.safetensors`` beside ``model.json``), or a run directory, which holds one.

    Raises:
        BadInputError: a file is missing or unreadable, or the two do not belong together.
    """
    folder = Path(folder)
    folder = folder / "model" if (folder / "model").is_dir() else folder
    for name in ("model.json", "model.safetensors"):
        if not (folder / name).is_file():
            raise BadInputError(f"{folder}: no {name} here, must be a folder that holds a saved model")
    try:
        config = ModelConfig.model_validate_json(read_text(folder / "model.json", "a model's configuration"))
    except ValidationError as error:
        raise BadInputError(
            f"{folder / 'model.json'}: {error.error_count()} key(s) do not fit this version of Conclave"
        ) from error
    if config.source is not None:  # opening a file must not run code that it names
        raise BadInputError(f"{folder}: is a model of {config.source}, must be built by it and given these weights")
    try:
        wire = load_file(folder / "model.safetensors")
        _check_belongs(wire, parameters.shapes(config, config.all_experts))
        network = from_state(config, config.all_experts, parameters.join(wire, config.all_experts))
    except (SafetensorError, KeyError, ValueError, RuntimeError) as error:
        raise BadInputError(
            f"{folder / 'model.safetensors'}: damaged, or not the weights that model.json describes"
        ) from error
    return network.eval()
