"""How many experts fit into a node's memory: from shapes, so it tells nothing about the data."""

from __future__ import annotations

from model import ModelConfig, parameters
from privacy.dpsgd import DpSgd

BYTES_A_PARAMETER = 48
"""What one parameter takes at once, at most: the message, the received value, the weight and its gradient (float32, 4
bytes each), the sum of clipped gradients, that of the present physical batch and noise (float64, 8 each), and the two
moments of an optimizer (8). Measured with Adam and experts of 4M parameters: 41.6."""


def experts_that_fit(model: ModelConfig, memory_mb: int) -> int:
    """Return how many experts of each layer a node can train within ``memory_mb`` MiB; 0 where not one fits.

    ``(memory − activations − 48·shared) / (48·expert)``, rounded down, at most all. The parameters of one expert are
    counted over all layers and with its router rows. Activations are the 1 GiB that a physical batch is cut to
    (:attr:`privacy.dpsgd.DpSgd.memory_bytes`): a token passes ``top_k`` experts however many are held, so they do not
    grow with that number. Interpreter, libraries and records come on top and are not in ``memory_mb``.

    Raises:
        BadInputError: the user's own model cannot be built.
    """
    every = expert = 0
    for name, shape in parameters.shapes(model, dict.fromkeys(range(model.layers), (0,))).items():
        if parameters.owner(name).layer is None:
            every += shape.numel()
        else:
            expert += shape.numel()
    left = memory_mb * 2**20 - DpSgd.memory_bytes - BYTES_A_PARAMETER * every
    return max(0, min(model.experts.routed, left // (BYTES_A_PARAMETER * expert)))
