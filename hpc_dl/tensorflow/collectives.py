"""The collectives other than all-reduce on TensorFlow tensors, with Horovod's names.

All run eagerly and in graphs, and are differentiable as Horovod's are.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import tensorflow as tf

from hpc_dl.comm import Op
from hpc_dl.comm.protocol import Array
from hpc_dl.errors import UnsupportedError
from hpc_dl.tensorflow import host
from hpc_dl.tensorflow.compression import Compression, resolve
from hpc_dl.world import ProcessSet, global_process_set
from hpc_dl.world import collectives as shared
from hpc_dl.world.collectives import resolve_op
from hpc_dl.world.objects import root_in


def _numbered(name: str | None, number: int, count: int) -> str | None:
    return name if name is None or count == 1 else f"{name}.{number}"


@host.as_written
def allgather(
    tensor: Any,
    name: str | None = None,
    ignore_name_scope: bool = False,
    process_set: ProcessSet = global_process_set,
) -> Any:
    """Concatenate the ranks' tensors along dimension 0, which may differ; differentiable."""
    return grouped_allgather([tensor], name, process_set=process_set)[0]


@host.as_written
def grouped_allgather(
    tensors: Sequence[Any],
    name: str | None = None,
    ignore_name_scope: bool = False,
    process_set: ProcessSet = global_process_set,
) -> list[Any]:
    """``allgather`` each of several tensors; differentiable."""
    count = len(tensors)

    def on_host(*arrays: Array) -> list[Array]:
        return [
            shared.allgather_start(array, _numbered(name, i, count), process_set).wait()
            for i, array in enumerate(arrays)
        ]

    @host.differentiable
    def run(*inputs: Any) -> Any:
        types = [t.dtype for t in inputs]
        shapes = [tf.TensorShape([None]).concatenate(t.shape[1:]) for t in inputs]
        outputs = host.call(on_host, inputs, types, shapes)

        def gradient(*upstream: Any) -> list[Any]:
            return _my_rows(inputs, upstream, process_set)

        return tuple(outputs), gradient

    return list(run(*map(tf.convert_to_tensor, tensors)))


def _my_rows(inputs: Sequence[Any], upstream: Sequence[Any], process_set: ProcessSet) -> list[Any]:
    """Average the gradients of gathered tensors over the ranks and cut out this rank's rows."""
    rank = process_set.rank()

    def on_host(*arrays: Array) -> list[Array]:
        own, gradients = arrays[: len(inputs)], arrays[len(inputs) :]
        results = []
        for rows, gradient in zip(own, gradients, strict=True):
            counts = shared.allgather_start(rows.reshape(1), None, process_set).wait()
            whole = gradient.copy()
            shared.allreduce_now(whole, Op.AVERAGE, 1.0, None, process_set)
            start = int(counts[:rank].sum())
            results.append(whole[start : start + int(rows)].copy())
        return results

    rows = [tf.shape(t, out_type=tf.int64)[0] for t in inputs]
    whole = [tf.cast(g, t.dtype) for g, t in zip(upstream, inputs, strict=True)]
    types, shapes = [t.dtype for t in inputs], [t.shape for t in inputs]
    return host.call(on_host, [*rows, *whole], types, shapes)


@host.as_written
def broadcast(
    tensor: Any,
    root_rank: int,
    name: str | None = None,
    ignore_name_scope: bool = False,
    process_set: ProcessSet = global_process_set,
) -> Any:
    """Return the tensor of rank ``root_rank``; differentiable."""

    def on_host(array: Array) -> list[Array]:
        copy = array.copy()
        shared.broadcast_start(copy, root_rank, name, process_set).wait()
        return [copy]

    def average(array: Array) -> list[Array]:
        copy = array.copy()
        shared.allreduce_now(copy, Op.AVERAGE, 1.0, None, process_set)
        return [copy if root_in(process_set, root_rank) == process_set.rank() else copy * 0]

    @host.differentiable
    def run(x: Any) -> Any:
        def gradient(upstream: Any) -> Any:
            return host.call(average, [upstream], [x.dtype], [x.shape])[0]

        return host.call(on_host, [x], [x.dtype], [x.shape])[0], gradient

    return run(tf.convert_to_tensor(tensor))


@host.as_written
def alltoall(
    tensor: Any,
    splits: Any = None,
    name: str | None = None,
    ignore_name_scope: bool = False,
    process_set: ProcessSet = global_process_set,
) -> Any:
    """Send parts of a tensor along dimension 0 to the ranks; differentiable.

    Args:
        splits: rows for each rank; None: equal parts.

    Returns:
        What came, concatenated by source rank; with ``splits`` also the int32 rows received
        from each rank.
    """
    wanted = [] if splits is None else [tf.convert_to_tensor(splits)]
    output, received = _alltoall(tf.convert_to_tensor(tensor), wanted, name, process_set)
    return output if splits is None else (output, received)


def _alltoall(
    tensor: Any, splits: Sequence[Any], name: str | None, process_set: ProcessSet
) -> tuple[Any, Any]:
    def on_host(array: Array, *rows: Array) -> list[Array]:
        wanted = rows[0] if rows else None
        handle = shared.alltoall_start(array, wanted, name, process_set)
        return list(handle.wait())

    @host.differentiable
    def run(x: Any) -> Any:
        shapes = [tf.TensorShape([None]).concatenate(x.shape[1:]), [process_set.size()]]
        output, received = host.call(on_host, [x, *splits], [x.dtype, tf.int32], shapes)

        def gradient(upstream: Any, _: Any) -> Any:
            back, _ = _alltoall(tf.cast(upstream, x.dtype), [received], None, process_set)
            return tf.ensure_shape(back, x.shape)

        return (output, received), gradient

    output, received = run(tensor)
    return output, received


@host.as_written
def reducescatter(
    tensor: Any,
    device_dense: str = "",
    compression: Any = Compression.none,
    op: Op = Op.AVERAGE,
    name: str | None = None,
    process_set: ProcessSet = global_process_set,
    ignore_name_scope: bool = False,
    prescale_factor: float = 1.0,
    postscale_factor: float = 1.0,
) -> Any:
    """Combine a tensor over the ranks, each keeping its part of dimension 0; differentiable.

    The parts are as equal as they can be; the first ranks get one row more.
    """
    scale = prescale_factor * postscale_factor
    reduced = _reducescatter([tensor], compression, op, scale, name, process_set)
    return reduced[0]


@host.as_written
def grouped_reducescatter(
    tensors: Sequence[Any],
    device_dense: str = "",
    compression: Any = Compression.none,
    op: Op = Op.AVERAGE,
    process_set: ProcessSet = global_process_set,
    prescale_factor: float = 1.0,
    postscale_factor: float = 1.0,
) -> list[Any]:
    """``reducescatter`` each of several tensors; differentiable."""
    scale = prescale_factor * postscale_factor
    return _reducescatter(tensors, compression, op, scale, None, process_set)


def _reducescatter(
    tensors: Sequence[Any],
    compression: Any,
    op: Op | None,
    scale: float,
    name: str | None,
    process_set: ProcessSet,
) -> list[Any]:
    op, compressor = resolve_op(op, None), resolve(compression)
    size, count = process_set.size(), len(tensors)

    def on_host(*arrays: Array) -> list[Array]:
        return [
            np.asarray(
                shared.reducescatter_start(
                    array, op, scale, _numbered(name, i, count), process_set
                ).wait()
            )
            for i, array in enumerate(arrays)
        ]

    @host.differentiable
    def run(*inputs: Any) -> Any:
        types = [t.dtype for t in inputs]
        shapes = [tf.TensorShape([None]).concatenate(t.shape[1:]) for t in inputs]
        outputs = host.call(on_host, inputs, types, shapes)

        def gradient(*upstream: Any) -> list[Any]:
            if op not in (Op.SUM, Op.AVERAGE):
                raise UnsupportedError(f"reducescatter with op={op.value} has no gradient")
            factor = scale * (size if op is Op.SUM else 1)
            scaled = [
                tf.cast(g, t) * tf.cast(factor, t) for g, t in zip(upstream, types, strict=True)
            ]
            whole = grouped_allgather(scaled, process_set=process_set)
            return [tf.ensure_shape(g, t.shape) for g, t in zip(whole, inputs, strict=True)]

        return tuple(outputs), gradient

    if not tensors:
        return []
    sent, contexts = zip(
        *(compressor.compress(tf.convert_to_tensor(t)) for t in tensors), strict=True
    )
    reduced = run(*sent)
    return [compressor.decompress(t, ctx) for t, ctx in zip(reduced, contexts, strict=True)]


@host.as_written
def barrier(process_set: ProcessSet = global_process_set) -> None:
    """Wait until all ranks have called it."""

    def on_host() -> list[Array]:
        shared.barrier(process_set)
        return []

    host.call(on_host, [], [], [])


@host.as_written
def join() -> Any:
    """Say that this rank has no more batches, and serve the others with zeros until they end.

    Averages go on to be taken over all ranks, as in Horovod: the joined ones count as zero.

    Returns:
        The rank that joined last, an int32 scalar.
    """

    def on_host() -> list[Array]:
        return [np.asarray(global_process_set.group().join(), np.int32)]

    return host.call(on_host, [], [tf.int32], [[]])[0]
