"""Sixteen bits for thirty-two: what every other compressor is measured against."""

from collections.abc import Generator
from dataclasses import dataclass
from typing import ClassVar

import ml_dtypes
import numpy as np

from hpc_dl.compress.base import AllReduced, Floats, Reduction, Round, State, Step, Unit
from hpc_dl.compress.kernels.casts import narrow, widen


class Cast(AllReduced):
    """Sends another type. The engine casts straight into the bucket where nothing is kept."""

    reduction: ClassVar[Reduction] = Reduction.LINEAR
    wire_dtype: ClassVar[np.dtype[np.generic]]

    def payload_bytes(self, unit: Unit, size: int) -> float:
        """Return the bytes of the narrow values."""
        return unit.size * self.wire_dtype.itemsize

    def rounds(
        self, x: Floats, out: Floats, left: Floats | None, state: State, unit: Unit, step: Step
    ) -> Generator[Round, None, None]:
        """Cast, average, and cast back."""
        narrowed = narrow(x, self.wire_dtype)
        if left is not None:
            widen(narrowed, out)
            np.subtract(x, out, out=left)
        yield Round(narrowed, "average")
        widen(narrowed, out)


@dataclass(frozen=True)
class NoCompression(Cast):
    """Send float32 as it is."""

    name: ClassVar[str] = "none"
    summary: ClassVar[str] = "float32 as it is"
    wire_dtype: ClassVar[np.dtype[np.generic]] = np.dtype(np.float32)


@dataclass(frozen=True)
class Float16(Cast):
    """Send float16: 11 bits of precision, up to 65504."""

    name: ClassVar[str] = "fp16"
    summary: ClassVar[str] = "float16: 11 bits of precision, up to 65504"
    wire_dtype: ClassVar[np.dtype[np.generic]] = np.dtype(np.float16)


@dataclass(frozen=True)
class BFloat16(Cast):
    """Send bfloat16: 8 bits of precision, the range of float32."""

    name: ClassVar[str] = "bf16"
    summary: ClassVar[str] = "bfloat16: 8 bits of precision, the range of float32"
    wire_dtype: ClassVar[np.dtype[np.generic]] = np.dtype(ml_dtypes.bfloat16)
