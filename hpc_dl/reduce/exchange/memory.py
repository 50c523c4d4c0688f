"""Where the arrays of an exchange lie, and the few operations in which that makes a difference.

Exchanges are written once: slices, ``+=`` and the like mean the same for NumPy arrays and for
tensors of torch.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np

from hpc_dl.comm import Communicator, Op
from hpc_dl.compress import Array, Floats
from hpc_dl.compress.kernels.casts import narrow, widen
from hpc_dl.compress.kernels.checks import is_finite
from hpc_dl.compress.residual import Residual, make_residual


class Memory:
    """The memory of the host; ``device.DeviceMemory`` has the same operations for a GPU's."""

    def note(self) -> None:
        """Take note that all that the caller has started must be done before an exchange."""

    @contextmanager
    def working(self) -> Iterator[None]:
        """Work on the arrays; when it is left, all is done."""
        yield

    def zeros(self, size: int) -> Any:
        """Make a flat array."""
        return np.zeros(size, np.float32)

    def residual(self, kind: str, size: int) -> Residual | None:
        """Make a residual of zeros; None for ``off``."""
        return make_residual(kind, size)

    def copy(self, x: Any) -> Any:
        """Return a copy."""
        return x.copy()

    def to_host(self, x: Any) -> Floats:
        """Return a copy on the host."""
        values: Floats = x.copy()
        return values

    def from_host(self, x: Array) -> Any:
        """Return an array that may share the memory of one on the host."""
        return x

    def is_finite(self, x: Any) -> bool:
        """Tell whether no value is, or is near to, infinity."""
        return is_finite(x)

    def dot(self, x: Any, y: Any) -> float:
        """Multiply; not finite where that overflows."""
        with np.errstate(over="ignore", invalid="ignore"):
            return float(np.dot(x, y))

    def narrow(self, x: Any, dtype: np.dtype[Any]) -> Any:
        """Return ``x`` in another type."""
        return narrow(x, dtype)

    def widen(self, x: Any, out: Any) -> None:
        """Write ``x`` to ``out`` as float32."""
        widen(x, out)

    def allreduce(self, comm: Communicator, x: Any, op: Op) -> None:
        """Combine an array over the ranks, in place."""
        comm.allreduce(x, op)
