"""Horovod built for TensorFlow, called with copies of NumPy arrays."""

from collections.abc import Callable
from functools import lru_cache
from typing import Any

import horovod.tensorflow as hvd
import numpy as np
import tensorflow as tf

from hpc_dl.comm.protocol import Array, Op

_OPS = {
    Op.SUM: hvd.Sum,
    Op.MIN: hvd.Min,
    Op.MAX: hvd.Max,
    Op.PRODUCT: hvd.Product,
    Op.ADASUM: hvd.Adasum,
}


#: Arguments of an operation by name, such that they can be the key of a cache.
Options = tuple[tuple[str, Any], ...]


class TensorFlowBinding:
    """The functions of ``horovod.tensorflow``; TensorFlow has no handles, so they block.

    Each runs in a graph of its own. Run eagerly, all operations of a kind have one name for
    Horovod, whatever they are given, and two communicators' operations are taken for one.
    """

    hvd = hvd
    blocks = True
    reducible = frozenset({"uint8", "int8", "int32", "int64", "float16", "float32", "float64"})

    def __init__(self) -> None:
        # A group that is closed leaves its graphs here until newer ones take their place.
        self._graph = lru_cache(maxsize=256)(_graph)

    def allreduce_starter(
        self, x: Array, op: Op, scale: float, name: str, group: Any
    ) -> Callable[[], None]:
        """Return a function that all-reduces in place."""
        # Halves are scaled before the sum, which overflows otherwise at scale. The factor
        # of Horovod's operation is a float32, so the others are scaled here.
        before, after = (scale, 1.0) if x.dtype.itemsize == 2 else (1.0, scale)
        options = (("name", name), ("op", _OPS[op]), ("prescale_factor", before))

        def start() -> None:
            reduced = self._run(hvd.allreduce, options, group, x)
            np.multiply(reduced.numpy(), x.dtype.type(after), out=x)

        return start

    def broadcast_start(self, x: Array, root: int, name: str, group: Any) -> None:
        """Broadcast in place."""
        options = (("root_rank", root), ("name", name))
        np.copyto(x, self._run(hvd.broadcast, options, group, x).numpy())

    def finish(self, handle: None) -> None:
        """Do nothing: the collective has blocked until its end."""

    def poll(self, handle: None) -> bool:
        """Return True: the collective has blocked until its end."""
        return True

    def allgather(self, x: Array, name: str, group: Any) -> Array:
        """Concatenate every rank's rows."""
        array: Array = self._run(hvd.allgather, (("name", name),), group, x).numpy()
        return array

    def alltoall(self, x: Array, rows: Array, name: str, group: Any) -> tuple[Array, Array]:
        """Send ``rows[i]`` rows to rank ``i``; return the rows received and their counts."""
        output, received = self._run(hvd.alltoall, (("name", name),), group, x, rows)
        return output.numpy(), received.numpy()

    def join(self) -> int:
        """Serve the others' all-reduces until all ranks have joined; return the last one."""
        # TensorFlow takes Horovod's operation for a constant, and a second eager call would
        # return the first one's result at once. A new graph makes it run.
        return int(tf.function(lambda: hvd.join(), autograph=False)())

    def _run(
        self, operation: Callable[..., Any], options: Options, group: Any, *arrays: Array
    ) -> Any:
        kinds = tuple((x.ndim, x.dtype.name) for x in arrays)
        graph = self._graph(operation, options, group, kinds)
        return graph(*(tf.convert_to_tensor(x) for x in arrays))


def _graph(
    operation: Callable[..., Any], options: Options, group: Any, kinds: tuple[tuple[int, str], ...]
) -> Callable[..., Any]:
    """Return ``operation`` as a graph for arrays of these dimensions and types, of any shape."""

    def call(*tensors: Any) -> Any:
        return operation(*tensors, process_set=group, **dict(options))

    specs = [tf.TensorSpec([None] * ndim, dtype) for ndim, dtype in kinds]
    graph: Callable[..., Any] = tf.function(call, input_signature=specs, autograph=False)
    return graph
