"""Combine one optimizer's gradients in the running world, and keep what compression owes."""

from collections.abc import Sequence
from typing import Any

from hpc_dl.keras.backend import outside_graph, reduction
from hpc_dl.keras.onebit import SharedMomentum
from hpc_dl.keras.saved_names import renamed
from hpc_dl.reduce import Saved, Traffic
from hpc_dl.world import Group
from hpc_dl.world.compression import warn_of_unused
from hpc_dl.world.gradients import Gradient, GradientOptions, unique
from hpc_dl.world.replicas import ReplicaWatch


class Combination:
    """The reduction of an optimizer's gradients; begun with the first step in a world."""

    def __init__(self, optimizer: Any, options: GradientOptions, label: str):
        """Begin nothing yet.

        Args:
            label: says whose gradients they are, in error messages.
        """
        self._optimizer, self._options, self._label = optimizer, options, label
        self._momentum = optimizer if isinstance(optimizer, SharedMomentum) else None
        self._reduction: Any = None
        self._group: Group | None = None
        self._watch: ReplicaWatch | None = None
        self._names: dict[str, None] = {}
        self._saved: Saved = {}
        self._loss: float | None = None

    def combine(self, shared: Sequence[Gradient]) -> list[Any]:
        """Return the combined gradients, None where there was none."""
        group = self._options.process_set.group()
        self._names |= dict.fromkeys(g.name for g in shared)
        if self._momentum is not None:
            self._momentum.receive_momentum([g.source for g in shared])
        if self._group is not group:
            self._begin(group, shared)
        number = None if self._momentum is None else self._momentum.iterations
        reduced: list[Any] = self._reduction(shared, self._watch, number)
        return reduced

    def _begin(self, group: Group, shared: Sequence[Gradient]) -> None:
        """Set up for the running world, once."""
        if self._optimizer.built:
            self._names |= dict.fromkeys(names_of(self._optimizer._trainable_variables))
        saved = renamed(self._saved, list(self._names))
        if self._group is not None and not self._saved:
            saved = self.compression_state()
            if self._group.comm.size != group.comm.size:
                warn_of_unused(saved)
                saved = {}
        self._group, self._saved = group, {}
        self._reduction = reduction(group, self._options, self._label)
        self._watch = ReplicaWatch(group, self._options.guard)
        if self._momentum is not None and not saved:
            with outside_graph():
                momenta = self._momentum.momenta([g.source for g in shared])
            # Where compression has no state, it goes on from the optimizer's.
            saved = {
                g.name: {"shared": m.astype("float32").reshape(-1)}
                for g, m in zip(shared, momenta, strict=False)
            }
        self._reduction.reducers.load_compression_state(saved)
        if self._loss is not None:
            self._reduction.reducers.report_loss(self._loss)

    def traffic(self) -> Traffic:
        """Return steps, bytes sent and seconds waited so far."""
        if self._reduction is None:
            return Traffic(0, 0, 0.0)
        done: Traffic = self._reduction.traffic()
        return done

    def compression_state(self) -> Saved:
        """Return what compression keeps between steps on this rank, by variable.

        Of a world of another size, give ``load_compression_state`` what
        ``hpc_dl.reduce.reshard`` makes of all ranks' states.
        """
        if self._reduction is None:
            return self._saved
        saved: Saved = self._reduction.reducers.compression_state()
        return saved

    def load_compression_state(self, saved: Saved) -> None:
        """Replace that by what ``compression_state`` returned; ``{}``: nothing is owed.

        Raises:
            OptionError: it is of other variables, now or in the first step.
        """
        if not self._options.combines:
            warn_of_unused(saved)
        elif self._reduction is None:
            self._saved = saved
        else:
            saved = renamed(saved, list(self._names))
            self._reduction.reducers.load_compression_state(saved)

    def report_loss(self, loss: float) -> None:
        """Let the guard of compression see this rank's loss; it suspends on a jump."""
        self._loss = float(loss)  # also for a reduction that is still to begin
        if self._reduction is not None:
            self._reduction.reducers.report_loss(self._loss)


def names_of(variables: Sequence[Any]) -> list[str]:
    """Return the names under which ranks compare variables."""
    found = (getattr(v, "path", None) or getattr(v, "name", "variable") for v in variables)
    return unique([str(name) for name in found])
