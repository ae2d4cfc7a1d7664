"""Records as tensors: what every model, loss and data source speaks of."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

Records = Mapping[str, Tensor]
"""Named tensors whose first axis is the record, for instance ``{"image": [N, C, H, W], "label": [N]}``."""

Batch = Records
"""The records that one forward pass sees, [B, …].

Optionally ``length``, integers [B]: the tokens of each record that are real; the others are padding.
"""
