"""The replica guard of optimizers whose steps are seen from the reduction of gradients.

It compares at the next reduction, when the step before it is complete on all ranks: so the
first comparison comes after a broadcast of the initial parameters that follows the first
batch, as Horovod's scripts do it.
"""

from hpc_dl.reduce.guard import Named, check_replicas, is_due
from hpc_dl.world.group import Group


class ReplicaWatch:
    """Counts the steps of one optimizer and compares the ranks' parameters when it is due."""

    def __init__(self, group: Group, enabled: bool = True):
        """Watch the ranks of ``group``; they make their watches in the same order."""
        self._group, self._enabled = group, enabled
        self._count = group.counter("reductions")
        self._steps = 0

    def due(self) -> bool:
        """Count a reduction and tell whether the steps before it are to be compared now."""
        self._steps = self._count() - 1
        return self._enabled and is_due(self._steps)

    def compare(self, named: Named) -> None:
        """Compare parameters over the ranks, unless some have run out of batches (``join``).

        Raises:
            ReplicaDivergenceError: on all ranks; names the first parameter that differs.
        """
        if self._group.all_present():
            check_replicas(self._group.comm, named, self._steps)
