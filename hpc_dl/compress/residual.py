"""What was not sent, kept until the next step in one of several types."""

from abc import ABC, abstractmethod

import numpy as np

from hpc_dl.compress.base import Floats
from hpc_dl.compress.kernels import maxabs
from hpc_dl.compress.kernels.casts import BFLOAT16, narrow, widen


class Residual(ABC):
    """A flat array of float32, perhaps stored in fewer bytes."""

    @abstractmethod
    def load(self) -> Floats:
        """Return a copy of the values."""

    @abstractmethod
    def store(self, values: Floats) -> None:
        """Keep these values; the array belongs to the residual from then on."""

    @property
    @abstractmethod
    def nbytes(self) -> int:
        """The bytes it takes."""


class Float32Residual(Residual):
    """Exact."""

    def __init__(self, size: int):
        self._values = np.zeros(size, np.float32)

    def load(self) -> Floats:
        """Copy."""
        return self._values.copy()

    def store(self, values: Floats) -> None:
        """Take the array over."""
        self._values = values

    @property
    def nbytes(self) -> int:
        """Four bytes for each value."""
        return self._values.nbytes


class BFloat16Residual(Residual):
    """Half the memory: what rounding to 8 bits leaves out is lost."""

    def __init__(self, size: int):
        self._values = np.zeros(size, BFLOAT16)

    def load(self) -> Floats:
        """Widen."""
        values = np.empty(len(self._values), np.float32)
        widen(self._values, values)
        return values

    def store(self, values: Floats) -> None:
        """Round."""
        self._values = narrow(values, BFLOAT16)

    @property
    def nbytes(self) -> int:
        """Two bytes for each value."""
        return self._values.nbytes


class Int8Residual(Residual):
    """A quarter of the memory: 127 steps up to the largest magnitude of each block."""

    def __init__(self, size: int):
        self._size = size
        self._levels = np.zeros(size, np.int8)
        self._scales = np.zeros(-(-size // maxabs.BLOCK), np.float32)

    def load(self) -> Floats:
        """Widen."""
        values = np.empty(self._size, np.float32)
        maxabs.decode(self._scales, self._levels, values)
        return values

    def store(self, values: Floats) -> None:
        """Round to the nearest step."""
        maxabs.encode(values, self._scales, self._levels)

    @property
    def nbytes(self) -> int:
        """One byte for each value, four for each block."""
        return self._levels.nbytes + self._scales.nbytes


def make_residual(kind: str, size: int) -> Residual | None:
    """Make a residual of zeros; None for ``off``."""
    if kind == "off":
        return None
    if kind == "fp32":
        return Float32Residual(size)
    return BFloat16Residual(size) if kind == "bf16" else Int8Residual(size)
