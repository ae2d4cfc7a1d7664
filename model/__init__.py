"""What is trained: mixture-of-experts models. Knows nothing of Flower, privacy or accounting."""

from model.building import build, from_state
from model.config import HeldExperts, ModelConfig
from model.errors import BadInputError
from model.network import Batch, Network, Output
from model.store import load, save_model

__all__ = [
    "BadInputError",
    "Batch",
    "HeldExperts",
    "ModelConfig",
    "Network",
    "Output",
    "build",
    "from_state",
    "load",
    "save_model",
]
