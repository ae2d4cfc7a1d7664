"""Configuration of the checks of replies."""

from __future__ import annotations

from pydantic import Field

from conclave.base.frozen import Frozen


class NoiseTestConfig(Frozen):
    """Drop a reply that does not look like its noise, see :mod:`conclave.server.replies.noise_likeness`.

    signal: what is assumed of honest nodes: the largest norm of the sum of a batch's clipped gradients, as a share
        of its units × the clip bound. 1 assumes nothing. Less finds smaller lies, and may drop nodes above it.
    across_rounds: compare replies with what their node sent in earlier rounds. The server then keeps, and checkpoints,
        one float32 copy for each node of what it held so far. Without it, the same noise passes in every round.
    """

    signal: float = Field(default=1.0, gt=0.0, le=1.0)
    across_rounds: bool = True
