"""All-reduce of TensorFlow tensors, eagerly and in graphs, with Horovod's names."""

from collections.abc import Sequence
from typing import Any

import tensorflow as tf

from hpc_dl.comm import Op
from hpc_dl.comm.protocol import Array
from hpc_dl.errors import UnsupportedError
from hpc_dl.tensorflow import host, native
from hpc_dl.tensorflow.collectives import grouped_allgather
from hpc_dl.tensorflow.compression import Compression, resolve
from hpc_dl.world import ProcessSet, global_process_set
from hpc_dl.world.collectives import allreduce_now, pack, resolve_op, unpack


@host.as_written
def allreduce(
    tensor: Any,
    average: bool | None = None,
    device_dense: str = "",
    device_sparse: str = "",
    compression: Any = Compression.none,
    op: Op | None = None,
    prescale_factor: float = 1.0,
    postscale_factor: float = 1.0,
    name: str | None = None,
    process_set: ProcessSet = global_process_set,
    ignore_name_scope: bool = False,
) -> Any:
    """Combine a tensor over the ranks into a new one; differentiable.

    Args:
        tensor: a tensor or variable, of the same shape and type on all ranks, or
            ``tf.IndexedSlices``, whose rows are gathered.
        average: Horovod's older way to say Average or Sum.
        device_dense: accepted for Horovod's sake, like ``device_sparse`` and
            ``ignore_name_scope``.
        compression: Compression.none, .fp16 or .bf16 (also by name), or a class with
            ``compress`` and ``decompress``.
        op: Average (the default), Sum, Min, Max, Product, or Adasum over Horovod.
        prescale_factor: and ``postscale_factor``: factors on the result of Sum and Average.
        name: by which the ranks' calls are compared; by default their number is.
        process_set: combine over these ranks only.
    """
    reduced = grouped_allreduce(
        [tensor],
        average,
        compression=compression,
        op=op,
        prescale_factor=prescale_factor,
        postscale_factor=postscale_factor,
        process_set=process_set,
        name=name,
    )
    return reduced[0]


@host.as_written
def grouped_allreduce(
    tensors: Sequence[Any],
    average: bool | None = None,
    device_dense: str = "",
    device_sparse: str = "",
    compression: Any = Compression.none,
    op: Op | None = None,
    prescale_factor: float = 1.0,
    postscale_factor: float = 1.0,
    process_set: ProcessSet = global_process_set,
    ignore_name_scope: bool = False,
    name: str | None = None,
) -> list[Any]:
    """``allreduce`` several tensors as one; they may differ in type. Differentiable."""
    op, compressor = resolve_op(op, average), resolve(compression)
    scale = prescale_factor * postscale_factor
    results: list[Any] = list(tensors)
    sparse = [i for i, t in enumerate(tensors) if isinstance(t, tf.IndexedSlices)]
    dense = [i for i in range(len(tensors)) if i not in sparse]
    if sparse:
        if scale != 1.0:
            raise UnsupportedError(
                f"a scale factor ({scale}) does not go with tf.IndexedSlices; scale their values, "
                "or pass tf.convert_to_tensor(slices)"
            )
        slices = [tensors[i] for i in sparse]
        for i, slice_ in zip(sparse, allreduce_slices(slices, op, name, process_set), strict=True):
            results[i] = slice_
    if dense:
        sent, contexts = zip(
            *(compressor.compress(tf.convert_to_tensor(tensors[i])) for i in dense), strict=True
        )
        reduced = allreduce_dense(sent, op, scale, name, process_set)
        for i, tensor, context in zip(dense, reduced, contexts, strict=True):
            results[i] = compressor.decompress(tensor, context)
    return results


def allreduce_dense(
    tensors: Sequence[Any], op: Op, scale: float, name: str | None, process_set: ProcessSet
) -> list[Any]:
    """Combine dense tensors; the gradient is combined by the same op, as in Horovod."""
    if not tensors:
        return []
    group = process_set.group()
    if native.serves(group.comm, tensors, op, scale):
        return native.allreduce(group, tensors, op, scale, name)

    def on_host(*arrays: Array) -> list[Array]:
        flats = pack(arrays)
        for dtype, flat in flats.items():
            label = name if name is None or len(flats) == 1 else f"{name}.{dtype.name}"
            allreduce_now(flat, op, scale, label, process_set)
        return unpack(flats, arrays)

    @host.differentiable
    def run(*inputs: Any) -> Any:
        types, shapes = [t.dtype for t in inputs], [t.shape for t in inputs]
        outputs = host.call(on_host, inputs, types, shapes)

        def gradient(*upstream: Any) -> list[Any]:
            label = None if name is None else f"{name}.gradient"
            upstream = tuple(
                tf.cast(tf.convert_to_tensor(g), t) for g, t in zip(upstream, types, strict=True)
            )
            return allreduce_dense(upstream, op, scale, label, process_set)

        return tuple(outputs), gradient

    return list(run(*tensors))


def allreduce_slices(
    slices: Sequence[Any], op: Op, name: str | None, process_set: ProcessSet
) -> list[Any]:
    """Combine sparse tensors by gathering the rows of all ranks.

    Raises:
        UnsupportedError: an op other than AVERAGE and SUM.
    """
    if op not in (Op.AVERAGE, Op.SUM):
        raise UnsupportedError(
            f"tf.IndexedSlices can be averaged or summed, not {op.value}; pass "
            "sparse_as_dense=True, or tf.convert_to_tensor(slices)"
        )
    size = process_set.group().comm.size
    parts = [part for s in slices for part in (s.values, s.indices)]
    gathered = grouped_allgather(parts, name=name, process_set=process_set)
    return [
        tf.IndexedSlices(
            values / tf.cast(size, values.dtype) if op is Op.AVERAGE else values,
            indices,
            s.dense_shape,
        )
        for s, values, indices in zip(slices, gathered[::2], gathered[1::2], strict=True)
    ]
