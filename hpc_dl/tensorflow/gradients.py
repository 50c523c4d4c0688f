"""Reduce lists of gradients, eagerly and in graphs: what the tape and Keras share.

The dense gradients of a step travel in fusion buckets, in one call from the graph to the
host; sparse ones gather the rows that each rank touched.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np
import tensorflow as tf

from hpc_dl.arrays import Parameter
from hpc_dl.comm.protocol import Array
from hpc_dl.compress import Policy
from hpc_dl.reduce import Traffic
from hpc_dl.reduce.build import DENSE
from hpc_dl.reduce.traffic import bytes_of_allreduce
from hpc_dl.tensorflow import host, native
from hpc_dl.tensorflow.allreduce import allreduce_dense
from hpc_dl.tensorflow.compression import CASTS, in_graph
from hpc_dl.tensorflow.sparse import allreduce_rows
from hpc_dl.world import Group
from hpc_dl.world.gradients import Gradient, GradientOptions, group_names, on_host
from hpc_dl.world.reducers import Reducers
from hpc_dl.world.replicas import ReplicaWatch

#: Reduces, and tells whether the guard is due.
Way = Callable[[], list[Any]]


class GradientReduction:
    """Combines the gradients of one optimizer or tape over the ranks, step after step."""

    def __init__(self, group: Group, options: GradientOptions, label: str):
        """Begin; the ranks agree on the gradients in the first step.

        Args:
            label: says whose gradients they are, in error messages.
        """
        self.group, self._options = group, options
        self._in_graph = in_graph(options.compression)
        self._policy = on_host(options.compression)
        self.reducers = Reducers(group, label, options.op, options.predivide, self._policy)
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
            label, op, policy = self.reducers.label, self._options.op, self._policy_of_rows
            slices = allreduce_rows(sparse, op, policy, label, self.group, self._count_rows)
            results.update(zip([g.name for g in sparse], slices, strict=True))
        if self._options.guard:
            _compare_if(due, gradients, watch)
        return [results.get(g.name) for g in gradients]

    def traffic(self) -> Traffic:
        """Return steps, bytes sent and seconds waited so far.

        The seconds are those spent on the host; Horovod's own operations wait in the graph.
        """
        reduced = self.reducers.traffic()
        return Traffic(
            self._steps + reduced.steps,
            self._bytes + reduced.bytes_sent,
            reduced.wait_seconds,
            self._bytes_dense,
        )

    def _policy_of_rows(self) -> Policy:
        """Return the policy in force; of a cast in the graph, which the reducers do not know."""
        given = self._options.compression
        in_graph = isinstance(given, Policy) and self._policy is DENSE
        policy: Policy = given if in_graph else self.reducers.compression.policy
        return policy

    def _count_rows(self, traffic: Traffic) -> None:
        self._bytes += traffic.bytes_sent
        self._bytes_dense += traffic.bytes_dense

    def _reduce_dense(
        self, dense: Sequence[Gradient], watch: ReplicaWatch, number: Any
    ) -> tuple[dict[str, Any], Any]:
        """Return combined gradients by name, and whether the guard is due."""
        options = self._options
        scaled = [g.value if options.predivide == 1 else g.value / options.predivide for g in dense]
        given = [
            g._replace(value=tf.convert_to_tensor(v)) for g, v in zip(dense, scaled, strict=True)
        ]
        # Sources that are tensors may have other shapes in each step; buckets are for variables.
        variables = [g for g in given if hasattr(g.source, "assign")]
        others = [g for g in given if not hasattr(g.source, "assign")]
        own = sum(_nbytes(g.source) for g in variables)

        def on_host(sent: Sequence[Gradient]) -> list[Any]:
            return self._reduce_on_host(sent, watch, own, number)

        def natively(sent: Sequence[Gradient]) -> list[Any]:
            tensors = [g.value for g in sent]
            if native.serves(self.group.comm, tensors, options.op, options.predivide):
                return self._reduce_natively(sent, watch, own)
            return on_host(sent)

        if self._policy is DENSE:
            *combined, due = _cast(self._in_graph, natively, variables)
        elif self._policy.rules or not self.group.comm.negotiates:
            *combined, due = on_host(variables)
        else:
            ways = [partial(_cast, kind, natively, variables) for kind in CASTS.values()]
            *combined, due = self._settled_or(partial(on_host, variables), ways)
        pairs = [self._in_graph.compress(g.value) for g in others]
        reduced = allreduce_dense(
            [tensor for tensor, _ in pairs],
            options.op,
            options.predivide,
            f"{self.reducers.label}.tensors",
            options.process_set,
        )
        results = dict(zip([g.name for g in variables], combined, strict=True))
        for g, tensor, (_, context) in zip(others, reduced, pairs, strict=True):
            results[g.name] = self._in_graph.decompress(tensor, context)
        return results, due

    def _settled_or(self, otherwise: Way, casts: Sequence[Way]) -> list[Any]:
        """Go the way of the cast that ``auto`` has settled on, if it has; asked in each step."""

        def number() -> int:
            cast = self.reducers.compression.settled_cast
            return 0 if cast is None else 1 + list(CASTS).index(cast)

        ways = [otherwise, *casts]
        if tf.executing_eagerly():
            return ways[number()]()
        index = host.call(lambda: [np.asarray(number(), np.int32)], [], [tf.int32], [[]])[0]
        results: list[Any] = tf.switch_case(index, ways)
        return results

    def _reduce_on_host(
        self, sent: Sequence[Gradient], watch: ReplicaWatch, own_bytes: int, number: Any
    ) -> list[Any]:
        """Return the combined gradients, and whether the guard is due."""
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
            found = self.reducers.find(parameters, groups)
            reducer, places = found.reducer, found.places
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
        return host.call(exchange, [*counted, *tensors], [*types, tf.bool], [*shapes, []])

    def _reduce_natively(
        self, sent: Sequence[Gradient], watch: ReplicaWatch, own_bytes: int
    ) -> list[Any]:
        """Return the combined gradients, and whether the guard is due."""
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
        return [*native.allreduce(self.group, tensors, op, scale, label), due]


def _cast(
    kind: Any, reduce: Callable[[Sequence[Gradient]], list[Any]], gradients: Sequence[Gradient]
) -> list[Any]:
    """Let gradients travel in another type."""
    pairs = [kind.compress(g.value) for g in gradients]
    sent = [g._replace(value=tensor) for g, (tensor, _) in zip(gradients, pairs, strict=True)]
    *combined, due = reduce(sent)
    own = zip(combined, pairs, strict=True)
    return [*(kind.decompress(tensor, context) for tensor, (_, context) in own), due]


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
