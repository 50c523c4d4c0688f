"""Reduce lists of gradients, eagerly and in graphs: what the tape and Keras share.

The dense gradients of a step travel in fusion buckets, in one call from the graph to the
host; sparse ones gather the rows that each rank touched.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import tensorflow as tf

from hpc_dl.arrays import Parameter
from hpc_dl.comm.protocol import Array
from hpc_dl.reduce import Traffic
from hpc_dl.reduce.build import DENSE
from hpc_dl.reduce.traffic import bytes_of_allreduce
from hpc_dl.tensorflow import host, native
from hpc_dl.tensorflow.allreduce import allreduce_dense, allreduce_slices
from hpc_dl.tensorflow.compression import in_graph
from hpc_dl.world import Group
from hpc_dl.world.reducers import Gradient, GradientOptions, Reducers, group_names, on_host
from hpc_dl.world.replicas import ReplicaWatch


class GradientReduction:
    """Combines the gradients of one optimizer or tape over the ranks, step after step."""

    def __init__(self, group: Group, options: GradientOptions, label: str):
        """Begin; the ranks agree on the gradients in the first step.

        Args:
            label: says whose gradients they are, in error messages.
        """
        self.group, self._options = group, options
        self._compressor = in_graph(options.compression)
        policy = on_host(options.compression)
        self._compresses = policy is not DENSE
        self.reducers = Reducers(group, label, options.op, options.predivide, policy)
        self._steps, self._bytes, self._bytes_dense = 0, 0, 0

    def __call__(
        self, gradients: Sequence[Gradient], watch: ReplicaWatch, number: Any = None
    ) -> list[Any]:
        """Return the combined gradients, None where there was none.

        Args:
            gradients: with unique names, the same on all ranks.
            watch: counts the steps of these variables; the guard compares them when it is
                due.
            number: of the optimizer's step, where it must be that of the compression.

        Raises:
            MismatchError: on all ranks, if they reduce different gradients.
            ReplicaDivergenceError: on all ranks, if their variables differ.
        """
        if self._options.sparse_as_dense:
            gradients = [
                g if g.value is None else g._replace(value=tf.convert_to_tensor(g.value))
                for g in gradients
            ]
        present = [g for g in gradients if g.value is not None]
        sparse = [g for g in present if isinstance(g.value, tf.IndexedSlices)]
        dense = [g for g in present if not isinstance(g.value, tf.IndexedSlices)]
        results, due = self._reduce_dense(dense, watch, number)
        if sparse:
            slices = allreduce_slices(
                [g.value for g in sparse],
                self._options.op,
                f"{self.reducers.label}.{sparse[0].name}",
                self._options.process_set,
            )
            results.update(zip([g.name for g in sparse], slices, strict=True))
            self._count_rows([g.value for g in sparse])
        if self._options.guard:
            _compare_if(due, gradients, watch)
        return [results.get(g.name) for g in gradients]

    def traffic(self) -> Traffic:
        """Return steps, bytes sent and seconds waited so far.

        The seconds are those spent on the host; Horovod's own operations wait in the graph.
        """
        reduced = self.reducers.traffic()
        return Traffic(
            max(self._steps, reduced.steps),
            self._bytes + reduced.bytes_sent,
            reduced.wait_seconds,
            self._bytes_dense,
        )

    def _count_rows(self, slices: Sequence[Any]) -> None:
        """Count what this rank gives to gathers of rows."""
        widths = [s.values.dtype.size for s in slices] + [s.indices.dtype.size for s in slices]
        others = self.group.comm.size - 1

        def count(*counts: Array) -> list[Array]:
            self._bytes += others * sum(int(n) * w for n, w in zip(counts, widths, strict=True))
            return []

        parts = [s.values for s in slices] + [s.indices for s in slices]
        host.call(count, [tf.size(part) for part in parts], [], [])

    def _reduce_dense(
        self, dense: Sequence[Gradient], watch: ReplicaWatch, number: Any
    ) -> tuple[dict[str, Any], Any]:
        """Return combined gradients by name, and whether the guard is due."""
        options = self._options
        scaled = [g.value if options.predivide == 1 else g.value / options.predivide for g in dense]
        pairs = [self._compressor.compress(tf.convert_to_tensor(value)) for value in scaled]
        sent = [g._replace(value=tensor) for g, (tensor, _) in zip(dense, pairs, strict=True)]
        own = sum(_nbytes(g.source) for g in dense if hasattr(g.source, "assign"))
        # Sources that are tensors may have other shapes in each step; buckets are for variables.
        variables = [i for i, g in enumerate(sent) if hasattr(g.source, "assign")]
        others = [i for i in range(len(sent)) if i not in variables]
        reduced: list[Any] = [None] * len(sent)
        tensors = [sent[i].value for i in variables]
        if not self._compresses and native.serves(
            self.group.comm, tensors, options.op, options.predivide
        ):
            combined, due = self._reduce_natively([sent[i] for i in variables], watch, own)
        else:
            combined, due = self._reduce_on_host([sent[i] for i in variables], watch, own, number)
        combined += allreduce_dense(
            [sent[i].value for i in others],
            options.op,
            options.predivide,
            f"{self.reducers.label}.tensors",
            options.process_set,
        )
        for i, tensor in zip([*variables, *others], combined, strict=True):
            reduced[i] = tensor
        results = {
            g.name: self._compressor.decompress(tensor, context)
            for g, tensor, (_, context) in zip(dense, reduced, pairs, strict=True)
        }
        return results, due

    def _reduce_on_host(
        self, sent: Sequence[Gradient], watch: ReplicaWatch, own_bytes: int, number: Any
    ) -> tuple[list[Any], Any]:
        names = [g.name for g in sent]
        groups = group_names(self._options.groups, names, [g.source for g in sent])

        counted = [] if number is None else [tf.convert_to_tensor(number)]

        def exchange(*given: Array) -> list[Array]:
            arrays = given[len(counted) :]
            self.reducers.count(int(given[0]) if counted else None)
            parameters = tuple(
                Parameter(name, tuple(array.shape), array.dtype)
                for name, array in zip(names, arrays, strict=True)
            )
            self._bytes_dense += bytes_of_allreduce(own_bytes, self.group.comm.size)
            reducer, places = self.reducers.find(parameters, groups)
            for array, place in zip(arrays, places, strict=True):
                np.copyto(place.view, array.reshape(-1), casting="unsafe")
                reducer.ready(place.bucket)
            self.reducers.finish(reducer)
            # Copies: TensorFlow may keep a result for as long as it likes.
            results = [
                place.view.astype(array.dtype).reshape(array.shape)
                for array, place in zip(arrays, places, strict=True)
            ]
            return [*results, np.asarray(watch.due())]

        tensors = [g.value for g in sent]
        types, shapes = [t.dtype for t in tensors], [t.shape for t in tensors]
        *reduced, due = host.call(exchange, [*counted, *tensors], [*types, tf.bool], [*shapes, []])
        return reduced, due

    def _reduce_natively(
        self, sent: Sequence[Gradient], watch: ReplicaWatch, own_bytes: int
    ) -> tuple[list[Any], Any]:
        parameters = tuple(
            Parameter(g.name, tuple(g.value.shape), np.dtype(g.value.dtype.as_numpy_dtype))
            for g in sent
        )

        nbytes = sum(p.nbytes for p in parameters)

        def begin() -> list[Array]:
            self.reducers.agree_once(parameters)
            self._steps += 1
            self._bytes_dense += bytes_of_allreduce(own_bytes, self.group.comm.size)
            self._bytes += bytes_of_allreduce(nbytes, self.group.comm.size)
            return [np.asarray(watch.due())]

        due = host.call(begin, [], [tf.bool], [[]])[0]
        # Horovod would wait for ever for a gradient that another rank does not have.
        with tf.control_dependencies([due]):
            tensors = [tf.identity(g.value) for g in sent]
        op, scale, label = self._options.op, self._options.predivide, self.reducers.label
        return native.allreduce(self.group, tensors, op, scale, label), due


def _nbytes(variable: Any) -> int:
    size: int = tf.as_dtype(variable.dtype).size
    return int(np.prod(variable.shape)) * size


def _compare_if(due: Any, gradients: Sequence[Gradient], watch: ReplicaWatch) -> None:
    """Compare the variables, as they were before this step, over the ranks if it is due."""
    watched = [g for g in gradients if hasattr(g.source, "assign")]
    if not watched:
        return

    def look(*arrays: Array) -> list[Array]:
        watch.compare(zip((g.name for g in watched), arrays, strict=True))
        return []

    def compare() -> Any:
        # The values are read in the program's order: before the optimizer changes them.
        host.call(look, [tf.convert_to_tensor(g.source) for g in watched], [], [])
        return tf.constant(True)

    if not tf.executing_eagerly():
        tf.cond(due, compare, lambda: tf.constant(False))
    elif bool(due):
        compare()
