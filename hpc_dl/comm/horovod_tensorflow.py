"""Horovod built for TensorFlow, called with copies of NumPy arrays."""

from collections.abc import Callable
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


class TensorFlowBinding:
    """The functions of ``horovod.tensorflow``; TensorFlow has no handles, so they block."""

    hvd = hvd
    #: Run eagerly, all operations of a kind have one name for Horovod, whatever they are given:
    #: two at a time would be taken for one.
    blocks = True
    reducible = frozenset({"uint8", "int8", "int32", "int64", "float16", "float32", "float64"})

    def allreduce_starter(
        self, x: Array, op: Op, scale: float, name: str, group: Any
    ) -> Callable[[], None]:
        """Return a function that all-reduces in place."""
        # Halves are scaled before the sum, which overflows otherwise at scale. The factor
        # of Horovod's operation is a float32, so the others are scaled here.
        before, after = (scale, 1.0) if x.dtype.itemsize == 2 else (1.0, scale)

        def start() -> None:
            reduced = hvd.allreduce(
                tf.convert_to_tensor(x),
                name=name,
                op=_OPS[op],
                prescale_factor=before,
                process_set=group,
            )
            np.multiply(reduced.numpy(), x.dtype.type(after), out=x)

        return start

    def broadcast_start(self, x: Array, root: int, name: str, group: Any) -> None:
        """Broadcast in place."""
        received = hvd.broadcast(tf.convert_to_tensor(x), root, name=name, process_set=group)
        np.copyto(x, received.numpy())

    def finish(self, handle: None) -> None:
        """Do nothing: the collective has blocked until its end."""

    def poll(self, handle: None) -> bool:
        """Return True: the collective has blocked until its end."""
        return True

    def allgather(self, x: Array, name: str, group: Any) -> Array:
        """Concatenate every rank's rows."""
        gathered = hvd.allgather(tf.convert_to_tensor(x), name=name, process_set=group)
        array: Array = gathered.numpy()
        return array

    def alltoall(self, x: Array, rows: Array, name: str, group: Any) -> tuple[Array, Array]:
        """Send ``rows[i]`` rows to rank ``i``; return the rows received and their counts."""
        output, received = hvd.alltoall(
            tf.convert_to_tensor(x),
            splits=tf.constant(rows, tf.int32),
            name=name,
            process_set=group,
        )
        return output.numpy(), received.numpy()

    def join(self) -> int:
        """Serve the others' all-reduces until all ranks have joined; return the last one."""
        # TensorFlow takes Horovod's operation for a constant, and a second eager call would
        # return the first one's result at once. A new graph makes it run.
        return int(tf.function(lambda: hvd.join(), autograph=False)())
