"""Which tokens of a batch are real and which are padding.

A batch may carry ``length``, an integer [B]: an example's first ``length`` tokens are real, the rest is padding. What
padding holds never matters, not even NaN: it is left out by selection, never by multiplication with 0.

Dimension suffixes: B batch, T tokens, D width.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from conclave.base.errors import BadInputError


def present_tokens(batch: Mapping[str, Tensor], tokens: int) -> Tensor | None:
    """Return which tokens are real, bool [B, T]; None for a batch without ``length``, in which all are.

    A length below 0 counts as 0 and one above ``tokens`` as ``tokens``: whether a value is in range is private, so it
    is not an error.

    Raises:
        BadInputError: ``length`` is not one integer per example.
    """
    length_B = batch.get("length")
    if length_B is None:
        return None
    if length_B.dim() != 1 or length_B.is_floating_point() or length_B.dtype == torch.bool:
        raise BadInputError(
            f"length is {str(length_B.dtype).removeprefix('torch.')} {list(length_B.shape)}, "
            "must be one integer per example: [batch]"
        )
    return torch.arange(tokens, device=length_B.device) < length_B.unsqueeze(1)


def only_present(x_BTD: Tensor, present_BT: Tensor | None) -> Tensor:
    """Return exact zeros for padding, and the rest as it is."""
    return x_BTD if present_BT is None else torch.where(present_BT.unsqueeze(-1), x_BTD, 0.0)


def mean_over_present(value_BT: Tensor, present_BT: Tensor) -> Tensor:
    """Return each example's mean over its real tokens, [B] or, for values [B, T, D], [B, D]; 0 if there are none."""
    present = present_BT if value_BT.dim() == 2 else present_BT.unsqueeze(-1)
    return torch.where(present, value_BT, 0.0).sum(dim=1) / present.sum(dim=1).clamp(min=1)
