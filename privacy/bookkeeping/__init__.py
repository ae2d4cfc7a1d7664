"""Per-unit clipped sums from one backward pass, with certified norms (docs/privacy.md, rule 5).

Forward hooks keep each layer's input, tensor hooks its output gradient, and parameters take no part in the backward
pass. A layer's per-unit gradient norm follows from those two; once every layer's is known, one weighted product per
layer gives the clipped sum (Bu et al. 2022, arXiv:2210.00038; Goodfellow 2015, arXiv:1510.01799).
"""

from __future__ import annotations

from conclave.privacy.bookkeeping.recorder import Bookkeeper, UnitGradients
from conclave.privacy.bookkeeping.units import Units

__all__ = ["Bookkeeper", "UnitGradients", "Units"]
