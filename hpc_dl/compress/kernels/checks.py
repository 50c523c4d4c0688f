"""Look at a gradient before it is encoded."""

from typing import Any

import numpy as np

from hpc_dl.compress.base import Floats
from hpc_dl.compress.kernels.compile import Kernel

#: The exponent bits of 2**100. What is as large has no finite sum over the ranks, or leaves a
#: residual that would overflow in the steps that follow, so it counts as infinite.
_LARGEST = np.uint32((100 + 127) << 23)
_BLOCK = 4096


def _finite(bits: Any) -> bool:
    for start in range(0, len(bits), _BLOCK):
        largest = np.uint32(0)
        for i in range(start, min(start + _BLOCK, len(bits))):
            largest = max(largest, bits[i] & np.uint32(0x7FFFFFFF))
        if largest >= _LARGEST:
            return False
    return True


def _finite_reference(bits: Any) -> bool:
    return not ((bits & np.uint32(0x7FFFFFFF)) >= _LARGEST).any()


_finite_kernel = Kernel(_finite, _finite_reference)


def is_finite(x: Floats) -> bool:
    """Tell whether all values are finite, and below 2**100 (1.3e30) in magnitude."""
    return bool(_finite_kernel(x.view(np.uint32)))
