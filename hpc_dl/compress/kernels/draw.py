"""Random numbers in loops: those of ``compress.random``, one at a time.

They are part of what travels, so they never change; nor could they, since a cached loop holds
these functions as they were when it was compiled.
"""

from typing import Any

import numpy as np

from hpc_dl.compress.kernels.compile import called_by_loops
from hpc_dl.compress.random import GOLDEN, MIX

_ULP = np.float32(2.0**-24)


@called_by_loops
def hash_of(key: Any, counter: Any) -> Any:
    """Return 32 random bits; see ``random.hashed``."""
    h = np.uint32(np.uint32(counter) * GOLDEN + np.uint32(key))
    h = np.uint32(np.uint32(h ^ (h >> np.uint32(16))) * MIX)
    h = np.uint32(np.uint32(h ^ (h >> np.uint32(16))) * MIX)
    return np.uint32(h ^ (h >> np.uint32(16)))


@called_by_loops
def uniform_of(key: Any, counter: Any) -> Any:
    """Return a number in [0, 1); see ``random.uniform``."""
    # There are vector instructions for signed integers.
    return np.float32(np.int32(hash_of(key, counter) >> np.uint32(8))) * _ULP
