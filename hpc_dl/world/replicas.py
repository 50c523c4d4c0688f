"""The replica guard of optimizers whose steps are seen from the reduction of gradients.

It compares at the next reduction, when the step before it is complete on all ranks: so the
first comparison comes after a broadcast of the initial parameters that follows the first
batch, as Horovod's scripts do it.
"""

import numpy as np

from hpc_dl.comm import Op
from hpc_dl.reduce.guard import FIRST_CHECKS, Named, check_replicas
from hpc_dl.world.collectives import allreduce_now
from hpc_dl.world.process_sets import ProcessSet


class ReplicaWatch:
    """Counts the steps of one optimizer and compares the ranks' parameters when it is due."""

    def __init__(self, process_set: ProcessSet, label: str, enabled: bool = True):
        """Watch the ranks of ``process_set``.

        Args:
            label: names the optimizer, the same on all ranks.
        """
        self._process_set, self._label, self._enabled = process_set, label, enabled
        self._steps = -1

    def due(self) -> bool:
        """Count a reduction and tell whether the steps before it are to be compared now."""
        self._steps += 1
        return self._enabled and (
            self._steps in FIRST_CHECKS or (self._steps > 0 and self._steps % FIRST_CHECKS[-1] == 0)
        )

    def compare(self, named: Named) -> None:
        """Compare parameters over the ranks, unless some have run out of batches (``join``).

        Raises:
            ReplicaDivergenceError: on all ranks; names the first parameter that differs.
        """
        comm = self._process_set.group().comm
        present = np.ones(1)
        name = f"{self._label}.present.{self._steps}"
        allreduce_now(present, Op.SUM, 1.0, name, self._process_set)
        if round(float(present[0])) == comm.size:
            check_replicas(comm, named, self._steps)
