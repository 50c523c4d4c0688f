"""Random numbers addressed by what they are for, so that no rank keeps a state.

The bits come from Philox, whose stream NumPy guarantees not to change; the methods of
``numpy.random.Generator`` carry no such promise, so only its raw bits are used where an order
must be the same tomorrow.
"""

from enum import IntEnum

import numpy as np

from hpc_dl.errors import OptionError


class Purpose(IntEnum):
    """What a stream is for; streams of two purposes never overlap."""

    ORDER = 0
    AUGMENT = 1
    SYNTHETIC = 2
    WINDOWS = 3


def stream(purpose: Purpose, seed: int, epoch: int = 0, index: int = 0) -> np.random.Philox:
    """Return the bits that belong to (purpose, seed, epoch, index), the same on all ranks.

    Raises:
        OptionError: a negative number, or one above 64 bits.
    """
    for name, value in (("seed", seed), ("epoch", epoch), ("index", index)):
        if not 0 <= value < 1 << 64:
            raise OptionError(f"{name}={value}; give an integer from 0 to 2**64 - 1")
    counter = np.array([0, index, 0, purpose], np.uint64)
    return np.random.Philox(key=np.array([seed, epoch], np.uint64), counter=counter)
