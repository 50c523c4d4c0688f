"""Select entries above a threshold in one pass, together with error feedback."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from hpc_dl.compress.base import Floats
from hpc_dl.compress.kernels.compile import Kernel

#: Values that are looked at together: one large entry makes the loop look at each of them.
_GROUP = 32


def _select(
    x: Any, left: Any, keep: bool, threshold: Any, indices: Any, values: Any, clear: bool
) -> int:
    size, room, found = len(x), len(indices), 0
    for start in range(0, size, _GROUP):
        stop = min(start + _GROUP, size)
        # Without branches, so that the compiler uses vectors; most groups end here.
        above = 0
        if keep:
            if stop == start + _GROUP:
                for i in range(start, start + _GROUP):
                    y = left[i] + x[i]
                    left[i] = y
                    above += abs(y) >= threshold
            else:
                for i in range(start, stop):
                    y = left[i] + x[i]
                    left[i] = y
                    above += abs(y) >= threshold
        else:
            for i in range(start, stop):
                above += abs(x[i]) >= threshold
        if above == 0:
            continue
        for i in range(start, stop):
            y = left[i] if keep else x[i]
            if abs(y) >= threshold and found < room:
                indices[found] = i
                values[found] = y
                if keep and clear:
                    left[i] = 0
                found += 1
    return found


def _select_reference(
    x: Floats,
    left: Floats,
    keep: bool,
    threshold: np.float32,
    indices: NDArray[np.int32],
    values: Floats,
    clear: bool,
) -> int:
    whole = np.add(left, x, out=left) if keep else x
    found = np.flatnonzero(np.abs(whole) >= threshold)[: len(indices)]
    indices[: len(found)] = found
    values[: len(found)] = whole[found]
    if keep and clear:
        left[found] = 0
    return len(found)


#: (x, left, keep, threshold, indices, values, clear) -> number found: select from ``x``, or
#: where ``keep`` from ``x + left``, which is left in ``left`` but for what was selected (if
#: ``clear``). Stops selecting when ``indices`` is full.
select = Kernel(_select, _select_reference)


def _scatter_add(indices: Any, values: Any, out: Any) -> None:
    for i in range(len(indices)):
        out[indices[i]] += values[i]


def _scatter_add_reference(indices: NDArray[np.int32], values: Floats, out: Floats) -> None:
    np.add.at(out, indices, values)


#: (indices, values, out): add values at indices.
scatter_add = Kernel(_scatter_add, _scatter_add_reference)
