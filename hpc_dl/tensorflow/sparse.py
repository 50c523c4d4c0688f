"""All-reduce of sparse gradients (of embeddings): gather the rows that each rank touched."""

from collections.abc import Callable, Sequence
from typing import Any

import tensorflow as tf

from hpc_dl.comm import Op
from hpc_dl.comm.protocol import Array
from hpc_dl.compress import Policy
from hpc_dl.compress.rows import row_format, summed
from hpc_dl.reduce import Traffic
from hpc_dl.reduce.rows import check_op_of_rows, reduce_rows
from hpc_dl.tensorflow import host
from hpc_dl.world import Call, Group
from hpc_dl.world.gradients import Gradient


def allreduce_rows(
    gradients: Sequence[Gradient],
    op: Op,
    policy: Callable[[], Policy],
    label: str,
    group: Group,
    count: Callable[[Traffic], None],
) -> list[Any]:
    """Combine ``tf.IndexedSlices`` over the ranks.

    Args:
        op: AVERAGE or SUM.
        policy: tells, in each call, how rows travel; see ``row_format``.
        label: says whose gradients they are.
        count: told what each has sent.

    Returns:
        ``tf.IndexedSlices``, in which each row is there once.

    Raises:
        UnsupportedError: another op.
    """
    for gradient in gradients:
        check_op_of_rows(op, gradient.name)

    def on_host(*arrays: Array) -> list[Array]:
        results, now = [], policy()
        parts = zip(arrays[::3], arrays[1::3], arrays[2::3], strict=True)
        for gradient, (values, numbers, shape) in zip(gradients, parts, strict=True):
            form = row_format(now, gradient.name, shape.tolist(), values.dtype)
            given = summed(numbers, values.reshape(len(numbers), form.width))
            call = Call("sparse_allreduce", f"{label}.{gradient.name}", (None, *shape[1:].tolist()))
            group.agree(call._replace(dtype=form.describe(), op=op.value))
            rows, traffic = reduce_rows(group.comm, given, form, op)
            count(traffic)
            results += [
                rows.values.reshape(-1, *values.shape[1:]),
                rows.numbers.astype(numbers.dtype),
            ]
        return results

    slices = [gradient.value for gradient in gradients]
    inputs = [
        part for g in gradients for part in (g.value.values, g.value.indices, _shape(g.source))
    ]
    outputs = [part for s in slices for part in (s.values, s.indices)]
    results = host.call(
        on_host,
        inputs,
        [part.dtype for part in outputs],
        [tf.TensorShape([None]).concatenate(part.shape[1:]) for part in outputs],
    )
    return [
        tf.IndexedSlices(values, indices, s.dense_shape)
        for s, values, indices in zip(slices, results[::2], results[1::2], strict=True)
    ]


def _shape(source: Any) -> Any:
    """Return the shape of a table, which may be a tensor whose shape is not known beforehand."""
    static = tf.TensorShape(source.shape)
    if static.is_fully_defined():
        return tf.constant(static.as_list(), tf.int64)
    return tf.shape(source, out_type=tf.int64)
