"""The products of which PowerSGD consists, on arrays of the host.

``device.products`` has them for tensors. A product that only this rank uses, before an average, is
left to a library. What comes after an average has the same bytes on all ranks, whatever machine
they run on, so that replicas stay alike.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np

from hpc_dl.compress.base import Floats
from hpc_dl.compress.kernels import lowrank

#: Rows of which the matrix product reads its operand once: they stay in the cache.
_ROWS = 64


class Products:
    """Thin matrices are stored transposed, of shape (rank, length), where nothing else is said."""

    def empty(self, size: int) -> Any:
        """Make a flat array."""
        return np.empty(size, np.float32)

    def to_host(self, x: Any) -> Floats:
        """Return an array of the host, which may be ``x``."""
        values: Floats = x
        return values

    def from_host(self, x: Floats) -> Any:
        """Return an array, which may be ``x``."""
        return x

    def join(self, parts: Sequence[Any], out: Any) -> None:
        """Write flat arrays one after the other."""
        np.concatenate(parts, out=out)

    def times(self, matrix: Any, q: Any, out: Any) -> None:
        """Multiply by a thin matrix of unit columns; ``out`` is of shape (height, rank)."""
        columns = _unit(q).T.copy()
        for start in range(0, len(matrix), _ROWS):
            np.matmul(matrix[start : start + _ROWS], columns, out=out[start : start + _ROWS])

    def project(self, p: Any, matrix: Any, out: Any) -> None:
        """Multiply ``p`` by a matrix."""
        np.matmul(p, matrix, out=out)

    def multiply(self, p: Any, q: Any, x: Any, out: Any, left: Any) -> None:
        """Write the product of two thin matrices, and what ``x`` has beside it.

        The same bytes on all machines.
        """
        lowrank.multiply(p, q, x, out, out if left is None else left, left is not None)


def _unit(q: Floats) -> Floats:
    """Scale each row to norm 1: the products neither overflow nor underflow.

    What is spanned, which is all that counts, stays the same.
    """
    norms = np.sqrt(np.square(q, dtype=np.float64).sum(axis=1, keepdims=True))
    return np.asarray(q / np.maximum(norms, np.finfo(np.float64).tiny), np.float32)
