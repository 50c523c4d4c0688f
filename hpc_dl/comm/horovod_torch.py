"""Horovod built for torch, called with views of NumPy arrays."""

import functools
from collections.abc import Callable
from typing import Any

import horovod.torch as hvd
import numpy as np

from hpc_dl.arrays import is_device_tensor, torch_view
from hpc_dl.comm.protocol import Array, Op

_OPS = {
    Op.SUM: hvd.Sum,
    Op.MIN: hvd.Min,
    Op.MAX: hvd.Max,
    Op.PRODUCT: hvd.Product,
    Op.ADASUM: hvd.Adasum,
}


class TorchBinding:
    """The functions of ``horovod.torch``; started collectives run in its own thread."""

    hvd = hvd
    blocks = False
    reducible = frozenset({"int32", "int64", "float16", "float32", "float64"})

    def allreduce_starter(
        self, x: Any, op: Op, scale: float, name: str, group: Any
    ) -> Callable[[], int]:
        """Return a function that starts an all-reduce in place and returns its handle."""
        tensor = x if is_device_tensor(x) else torch_view(x)
        # Halves are scaled before the sum, which overflows otherwise at scale.
        before, after = (scale, 1.0) if tensor.dtype.itemsize == 2 else (1.0, scale)
        return functools.partial(
            hvd.allreduce_async_,
            tensor,
            name=name,
            op=_OPS[op],
            prescale_factor=before,
            postscale_factor=after,
            process_set=group,
        )

    def broadcast_start(self, x: Any, root: int, name: str, group: Any) -> int:
        """Start a broadcast in place and return its handle."""
        tensor = x if is_device_tensor(x) else torch_view(x)
        handle: int = hvd.broadcast_async_(tensor, root, name=name, process_set=group)
        return handle

    def finish(self, handle: int) -> None:
        """Wait for a started collective."""
        hvd.synchronize(handle)

    def poll(self, handle: int) -> bool:
        """Tell whether a started collective is complete."""
        return bool(hvd.poll(handle))

    def allgather(self, x: Array, name: str, group: Any) -> Array:
        """Concatenate every rank's rows."""
        gathered: Array = hvd.allgather(torch_view(x), name=name, process_set=group).numpy()
        return gathered

    def alltoall(self, x: Array, rows: Array, name: str, group: Any) -> tuple[Array, Array]:
        """Send ``rows[i]`` rows to rank ``i``; return the rows received and their counts."""
        splits = torch_view(rows.astype(np.int32))
        output, received = hvd.alltoall(torch_view(x), splits, name=name, process_set=group)
        return output.numpy(), received.numpy()

    def join(self) -> int:
        """Serve the others' all-reduces until all ranks have joined; return the last one."""
        return int(hvd.join())
