"""Add up gradients of several backward passes, so that ranks combine them less often."""

from collections.abc import Callable, Sequence
from typing import Any

import keras

from hpc_dl.errors import OptionError
from hpc_dl.keras.backend import dense, outside_graph

Step = Callable[[list[Any]], None]


class Accumulator:
    """The sums of gradients of one optimizer, in variables that are saved nowhere."""

    def __init__(self, variables: Sequence[Any], passes: int, average: bool):
        """Make room.

        Args:
            variables: whose gradients come, in their order.
            passes: after so many the sums are used.
            average: divide them by ``passes``.
        """
        self._passes, self._average = passes, average
        self._variables = list(variables)
        self._seen: set[int] = set()
        with outside_graph():
            self._count = keras.Variable(0, dtype="int32", trainable=False, name="passes")
            self._sums = [
                keras.Variable(
                    keras.ops.zeros(v.shape, v.dtype), dtype=v.dtype, trainable=False, name="sum"
                )
                for v in variables
            ]

    def check(self, variables: Sequence[Any]) -> None:
        """Make sure that these are the variables whose gradients are added up.

        Raises:
            OptionError: others, or in another order.
        """
        known = [id(v) for v in self._variables]
        if known != [id(v) for v in variables]:
            raise OptionError(
                f"apply() was first called with {_names(self._variables)} and now with "
                f"{_names(variables)}; with backward_passes_per_step give the same variables in "
                "the same order each time"
            )

    def add(self, gradients: Sequence[Any], step: Step) -> None:
        """Add gradients, None where there is none; call ``step`` with the sums in the last pass."""
        for i, gradient in enumerate(gradients):
            if gradient is not None:
                self._seen.add(i)
                self._sums[i].assign_add(keras.ops.cast(dense(gradient), self._sums[i].dtype))
        self._count.assign_add(1)
        keras.ops.cond(
            keras.ops.equal(self._count, self._passes), lambda: self._use(step), lambda: None
        )

    def _use(self, step: Step) -> None:
        sums = [
            (s / self._passes if self._average else keras.ops.convert_to_tensor(s))
            if i in self._seen
            else None
            for i, s in enumerate(self._sums)
        ]
        step(sums)
        for s in self._sums:
            s.assign(keras.ops.zeros_like(s))
        self._count.assign(0)


def _names(variables: Sequence[Any]) -> str:
    shown = ", ".join(str(getattr(v, "path", v.name)) for v in variables[:3])
    return f"{len(variables)} variables ({shown}{', ...' if len(variables) > 3 else ''})"
