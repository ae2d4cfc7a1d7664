"""A Flower array that holds tensors and packs them only when it leaves the process."""

from __future__ import annotations

from collections.abc import Mapping

from flwr.app import Array
from safetensors.torch import save
from torch import Tensor

STYPE = "safetensors"


def pack(tensors: Mapping[str, Tensor]) -> bytes:
    """Encode float32 tensors, in the order of their names, so equal tensors give equal bytes."""
    return save({name: tensors[name].detach().cpu().contiguous() for name in sorted(tensors)})


class TensorArray(Array):
    """An :class:`Array` of safetensors bytes made on demand.

    A receiver in this very process takes ``tensors`` and nothing is ever encoded. Flower's transports ask for
    ``data``, and what arrives elsewhere is an ordinary Array. Nobody may change the tensors in place.
    """

    # Flower names an object's class on the wire and accepts the ones it knows.
    __qualname__ = "Array"

    def __init__(self, tensors: Mapping[str, Tensor], packed: bytes | None = None) -> None:
        """Hold ``tensors``; ``packed`` are their bytes, where they are at hand already."""
        self.__dict__.update(dtype="uint8", stype=STYPE, _tensors=tensors)
        self.found_finite = False
        if packed is not None:
            self.__dict__["_data"] = packed

    def __reduce__(self) -> tuple[type[Array], tuple[str, tuple[int, ...], str, bytes]]:
        """Leave the process as an ordinary Array, also through Flower's Ray backend, which pickles messages."""
        return Array, (self.dtype, self.shape, self.stype, self.data)

    @property
    def tensors(self) -> Mapping[str, Tensor]:
        """The tensors themselves."""
        tensors: Mapping[str, Tensor] = self.__dict__["_tensors"]
        return tensors

    @property
    def data(self) -> bytes:  # type: ignore[override]  # a field there, computed here
        """The packed tensors; packed once."""
        if "_data" not in self.__dict__:
            self.__dict__["_data"] = pack(self.tensors)
        data: bytes = self.__dict__["_data"]
        return data

    @property
    def shape(self) -> tuple[int, ...]:  # type: ignore[override]
        """The number of packed bytes."""
        return (len(self.data),)
