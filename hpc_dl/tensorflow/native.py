"""All-reduce with Horovod's own TensorFlow operations, where Horovod is the communicator.

They run in Horovod's background thread, on the GPU over NCCL where it is built for that, and
each starts as soon as its gradient is there. Other communicators, and types that Horovod's
operations do not know, take the path over the host.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import tensorflow as tf

from hpc_dl.comm import Communicator, Op
from hpc_dl.comm.protocol import Array
from hpc_dl.errors import MismatchError
from hpc_dl.tensorflow import host
from hpc_dl.world import Group

#: Operations of a graph that bring in what it does not know beforehand.
_INPUTS = ("Placeholder", "PlaceholderWithDefault")
#: Operations whose result may follow from the shape of their inputs, which it knows.
_OF_SHAPES = ("Shape", "ShapeN", "Size", "Rank", "ZerosLike", "OnesLike")
#: The types that are reduced here; bfloat16 travels as float32.
_TYPES = (tf.bfloat16, tf.float16, tf.float32, tf.float64)


def serves(comm: Communicator, tensors: Sequence[Any], op: Op, scale: float) -> bool:
    """Tell whether Horovod's operations can reduce these tensors."""
    return (
        comm.name == "horovod"
        and (scale == 1.0 or op in (Op.SUM, Op.AVERAGE))
        and all(t.dtype in _TYPES for t in tensors)
    )


def _sent_as(dtype: Any) -> Any:
    return tf.float32 if dtype == tf.bfloat16 else dtype


def allreduce(
    group: Group, tensors: Sequence[Any], op: Op, scale: float, name: str | None
) -> list[Any]:
    """Combine tensors over the ranks into new ones; differentiable.

    Args:
        group: of a Horovod communicator.
        scale: a factor on the results of SUM and AVERAGE.
        name: the same on all ranks; by default that of the operation in the graph.

    Raises:
        MismatchError: in eager code, if ranks pass different shapes or types. A graph
            raises ``tf.errors.FailedPreconditionError`` with the same message.
    """
    if not tf.executing_eagerly():
        host.check_graph()
        return _allreduce(group.comm, tensors, op, scale, name)
    try:
        # One by one, eager calls would each wait for the ranks; in a graph they overlap.
        # (Horovod's grouped call would too, but hangs when a rank has joined.)
        results: list[Any] = _graphs(group)(op, scale, name)(*tensors)
        return results
    except tf.errors.OpError as error:
        _, mismatch, detail = error.message.partition("Mismatched")
        if not mismatch:
            raise
        said = detail.partition("\n")[0]
        raise MismatchError(f"ranks called different things: mismatched{said}") from error


def _graphs(group: Group) -> Callable[[Op, float, str | None], Any]:
    """Return what makes, and keeps as long as the group, the graphs of eager calls."""

    def make(op: Op, scale: float, name: str | None) -> Any:
        @tf.function(autograph=False)  # type: ignore[untyped-decorator]
        def run(*tensors: Any) -> list[Any]:
            return _allreduce(group.comm, tensors, op, scale, name)

        return run

    if _graphs not in group.kept:
        group.kept[_graphs] = functools.lru_cache(maxsize=256)(make)
    graphs: Callable[[Op, float, str | None], Any] = group.kept[_graphs]
    return graphs


def _allreduce(
    comm: Any, tensors: Sequence[Any], op: Op, scale: float, name: str | None
) -> list[Any]:
    hvd = comm.hvd
    factor = scale / comm.size if op is Op.AVERAGE else scale
    hvd_op = getattr(hvd, (Op.SUM if op is Op.AVERAGE else op).value.capitalize())

    def one(t: Any, name: str | None) -> Any:
        before, during, after = _factors(t.dtype, factor)
        reduced = hvd.allreduce(
            _unfolded(tf.cast(t, _sent_as(t.dtype))),
            op=hvd_op,
            name=name,
            prescale_factor=before,
            postscale_factor=during,
            process_set=comm.process_set,
        )
        return tf.cast(reduced if after == 1.0 else reduced * after, t.dtype)

    return [one(t, None if name is None else f"{name}.{i}") for i, t in enumerate(tensors)]


def _unfolded(t: Any) -> Any:
    """Hide from TensorFlow that a tensor of a graph is a constant.

    It takes Horovod's operation for a pure function. On a constant it would run it once,
    while it optimises the graph, before the collectives that come first in the program.
    """
    return t if tf.executing_eagerly() or not _is_constant(t) else _through_host(t)


def _is_constant(t: Any) -> bool:
    """Tell whether a tensor of a graph follows from nothing but constants."""
    seen, waiting = set(), [t.op]
    while waiting:
        operation = waiting.pop()
        if operation.op_def.is_stateful or operation.type in _INPUTS:
            return False
        for tensor in () if operation.type in _OF_SHAPES else operation.inputs:
            if tensor.op not in seen:
                seen.add(tensor.op)
                waiting.append(tensor.op)
    return True


@host.differentiable
def _through_host(t: Any) -> Any:
    def copy(x: Array) -> list[Array]:
        return [x.copy()]

    return host.call(copy, [t], [t.dtype], [t.shape])[0], lambda upstream: upstream


def _factors(dtype: Any, factor: float) -> tuple[float, float, float]:
    """Split a factor into one before the sum, one in Horovod and one after."""
    if dtype == tf.float16:  # which would overflow in the sum
        return factor, 1.0, 1.0
    if dtype == tf.float64:  # as the factors of Horovod's operation are float32
        return 1.0, 1.0, factor
    return 1.0, factor, 1.0
