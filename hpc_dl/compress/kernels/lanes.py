"""The order in which the values of a block are summed, the same everywhere.

Partial sums of every ``LANES``-th value, which a compiler keeps in vector registers; then the
second half of these is added to the first, until one is left. A GPU needs one operation for
each row of values and each halving.
"""

import numpy as np

from hpc_dl.compress.base import Floats

LANES = 64


def total(values: Floats) -> np.float32:
    """Sum values, none of which is below zero."""
    padded = np.zeros(-(-len(values) // LANES) * LANES, np.float32)  # zeros change no sum
    padded[: len(values)] = values
    lanes = np.add.accumulate(padded.reshape(-1, LANES))[-1]
    while len(lanes) > 1:
        lanes = lanes[: len(lanes) // 2] + lanes[len(lanes) // 2 :]
    return np.float32(lanes[0])
