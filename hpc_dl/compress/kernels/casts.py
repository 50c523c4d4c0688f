"""Cast float32 to 16 bits and back.

NumPy casts bfloat16 value by value and float16 without the instructions that processors have for
it; torch has both fast, so it does float16 where it is loaded.
"""

import sys
from typing import Any

import ml_dtypes
import numpy as np

from hpc_dl.arrays import torch_view
from hpc_dl.compress.base import Array, Floats
from hpc_dl.compress.kernels.compile import Kernel

BFLOAT16 = np.dtype(ml_dtypes.bfloat16)


def _to_bfloat16(bits: Any, out: Any) -> None:
    for i in range(len(bits)):
        x = bits[i]
        # Round to nearest, ties to even; of a NaN the sign is kept, as ml_dtypes does.
        rounded = (x + np.uint32(0x7FFF) + ((x >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)
        nan = (x & np.uint32(0x7FFFFFFF)) > np.uint32(0x7F800000)
        quiet = ((x >> np.uint32(16)) & np.uint32(0x8000)) | np.uint32(0x7FC0)
        out[i] = np.uint16(quiet) if nan else np.uint16(rounded)


def _to_bfloat16_reference(bits: Any, out: Any) -> None:
    rounded = (bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)
    nan = (bits & np.uint32(0x7FFFFFFF)) > np.uint32(0x7F800000)
    quiet = ((bits >> np.uint32(16)) & np.uint32(0x8000)) | np.uint32(0x7FC0)
    out[:] = np.where(nan, quiet, rounded)


def _from_bfloat16(halves: Any, out: Any) -> None:
    for i in range(len(halves)):
        out[i] = np.uint32(halves[i]) << np.uint32(16)


def _from_bfloat16_reference(halves: Any, out: Any) -> None:
    np.left_shift(halves.astype(np.uint32), np.uint32(16), out=out)


#: (bits of float32, bits of bfloat16): round.
to_bfloat16 = Kernel(_to_bfloat16, _to_bfloat16_reference)
#: (bits of bfloat16, bits of float32): widen.
from_bfloat16 = Kernel(_from_bfloat16, _from_bfloat16_reference)


def narrow(x: Floats, dtype: np.dtype[Any]) -> Array:
    """Return ``x`` in another type; what is too large becomes infinite."""
    out = np.empty(x.shape, dtype)
    if dtype == BFLOAT16:
        to_bfloat16(x.view(np.uint32), out.view(np.uint16))
    elif "torch" in sys.modules and x.flags.writeable:
        torch_view(out).copy_(torch_view(x))
    else:
        with np.errstate(over="ignore"):
            out[:] = x
    return out


def widen(x: Array, out: Floats) -> None:
    """Write ``x`` to ``out`` as float32."""
    if x.dtype == BFLOAT16:
        from_bfloat16(x.view(np.uint16), out.view(np.uint32))
    elif "torch" in sys.modules and x.flags.writeable:
        torch_view(out).copy_(torch_view(x))
    else:
        out[:] = x
