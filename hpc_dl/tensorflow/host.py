"""Call Python on host arrays: at once in eager code, in program order inside a graph.

TensorFlow runs the operations of a graph in any order that their inputs allow. Collectives
must run in the same order on all ranks, so each of them reads a counter and writes it: what
uses one resource runs in program order, also from within conditionals, loops and nested
functions.
"""

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import numpy as np
import tensorflow as tf
from tensorflow.python.ops import control_flow_util

from hpc_dl.comm.protocol import Array
from hpc_dl.errors import UnsupportedError
from hpc_dl.world import current

F = TypeVar("F", bound=Callable[..., Any])
#: Takes arrays, which it must not write to, and returns arrays.
HostFunction = Callable[..., Sequence[Array]]


def as_written(function: F) -> F:
    """Keep AutoGraph from rewriting ``function``, which decides nothing on tensors."""
    converted: F = tf.autograph.experimental.do_not_convert(function)
    return converted


def differentiable(function: Callable[..., Any]) -> Callable[..., Any]:
    """Give a function its own gradient: it returns (results, function of their gradients)."""
    wrapped: Callable[..., Any] = tf.custom_gradient(function)
    return wrapped


def call(
    function: HostFunction,
    tensors: Sequence[Any],
    dtypes: Sequence[Any],
    shapes: Sequence[Any],
) -> list[Any]:
    """Call ``function`` on the values of ``tensors``.

    Args:
        tensors: dense tensors or variables.
        dtypes: of the results.
        shapes: of the results, as far as they are known beforehand.

    Raises:
        UnsupportedError: inside a function that XLA compiles, or a graph of TensorFlow 1.
    """
    if tf.executing_eagerly():
        results = function(*(np.asarray(tf.convert_to_tensor(t).numpy()) for t in tensors))
        return [
            tf.convert_to_tensor(np.asarray(result), dtype)
            for result, dtype in zip(results, dtypes, strict=True)
        ]
    check_graph()

    def run(turn: Array, *arrays: Any) -> list[Any]:
        results = function(*(np.asarray(array) for array in arrays))
        return [np.int64(turn + 1), *(np.asarray(result, order="C") for result in results)]

    turn = _turn()
    outputs = tf.numpy_function(run, [turn.read_value(), *tensors], [tf.int64, *dtypes])
    turn.assign(tf.ensure_shape(outputs[0], ()))
    for output, shape in zip(outputs[1:], shapes, strict=True):
        output.set_shape(shape)
    return list(outputs[1:])


_the_turn: Any = None


def _turn() -> Any:
    """Return the counter through which calls are put in order."""
    global _the_turn
    if _the_turn is None:
        with tf.init_scope(), tf.device("CPU:0"):
            _the_turn = tf.Variable(0, trainable=False, dtype=tf.int64, name="hpc_dl_turn")
    return _the_turn


def check_graph() -> None:
    """Refuse a graph that a collective cannot be part of."""
    graph = tf.compat.v1.get_default_graph()
    if control_flow_util.GraphOrParentsInXlaContext(graph):
        raise UnsupportedError(
            "XLA cannot compile a collective: it is a call that leaves the graph. Pass "
            "jit_compile=False to model.compile() or tf.function(), or compile only the "
            "functions that compute the loss"
        )
    if not tf.compat.v1.executing_eagerly_outside_functions():
        raise UnsupportedError(
            "collectives run eagerly or in a tf.function, not in a graph of TensorFlow 1; "
            "remove tf.compat.v1.disable_eager_execution() and sessions"
        )
    if current().comm.name == "mpi":
        from mpi4py import MPI

        if MPI.Query_thread() < MPI.THREAD_SERIALIZED:
            raise UnsupportedError(
                "TensorFlow runs a graph on threads of its own, and this MPI allows calls from "
                "the main thread only. Use an MPI with MPI_THREAD_SERIALIZED or better, or run "
                "eagerly: model.compile(..., run_eagerly=True)"
            )
