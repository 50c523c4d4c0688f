"""One compiled pass that sums the buffers of all ranks and writes the sum to each.

NumPy adds two buffers at a time, and copies in a pass of its own. This loop holds a block
of the sum in the first-level cache, so its cost is hardly more than that of the memory
traffic (docs/performance.md has the figures). numba is optional: without it, or where it
does not work, the NumPy code in ``kernels`` does the same, to the same bits.
"""

import functools
import importlib
import logging
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from hpc_dl.comm.protocol import Array

log = logging.getLogger("hpc_dl.comm")

#: Fewer bytes than this are left to NumPy: they are in cache, and nothing need be compiled.
MIN_BYTES = 1 << 18
#: Elements of the sum that are held at a time.
BLOCK = 1024

_TYPES = (np.dtype(np.float32), np.dtype(np.float64))


def sum_into(
    sources: Sequence[Array], targets: Sequence[Array], lo: int, hi: int, scale: float
) -> bool:
    """Write elements ``lo:hi`` of the scaled sum of ``sources`` to all ``targets``.

    Returns:
        False where nothing was done: few bytes, another type, or no numba.
    """
    dtype = sources[0].dtype
    if len(sources) < 2 or (hi - lo) * dtype.itemsize < MIN_BYTES or dtype not in _TYPES:
        return False
    if not all(x.flags.behaved and x.flags.c_contiguous for x in (*sources, *targets)):
        return False
    compiled = _compiled()
    if compiled is None:
        return False
    compiled(tuple(sources), tuple(targets), lo, hi, dtype.type(scale))
    return True


def _sum(sources: Any, targets: Any, lo: int, hi: int, scale: Any) -> None:
    block = np.empty(BLOCK, sources[0].dtype)
    for start in range(lo, hi, BLOCK):
        count = min(BLOCK, hi - start)
        first = sources[0][start : start + count]
        second = sources[1][start : start + count]
        for i in range(count):
            block[i] = first[i] + second[i]
        for number in range(2, len(sources)):
            source = sources[number][start : start + count]
            for i in range(count):
                block[i] += source[i]
        for number in range(len(targets)):
            target = targets[number][start : start + count]
            for i in range(count):
                target[i] = block[i] * scale


@functools.cache
def _compiled() -> Callable[..., None] | None:
    try:
        numba = importlib.import_module("numba")
    except ImportError as error:
        log.debug("sums are taken with NumPy: %s", error)
        return None
    try:
        compiled: Callable[..., None] = numba.njit(nogil=True, cache=True)(_sum)
    except RuntimeError:  # no folder that may be written to: compile in each process
        compiled = numba.njit(nogil=True)(_sum)
    return compiled
