"""Sums of small arrays inside a node, with one barrier.

Each rank lays its array where all can see it, and sums all of them for itself. That is more
work than sharing it out, but there is no second wait, which for a small array is most of the
time: the sum takes less than MPI's own all-reduce.
"""

import numpy as np
from mpi4py import MPI

from hpc_dl.comm import window
from hpc_dl.comm.node_barrier import NodeBarrier
from hpc_dl.comm.protocol import Array


class SmallSums:
    """Two slots for each rank, used in turn.

    Who writes to a slot again has since passed the barrier of the other slot, and so have all
    ranks after they had read this one.
    """

    def __init__(self, node: MPI.Intracomm, barrier: NodeBarrier, max_bytes: int):
        """Allocate the slots; all ranks of the node call this."""
        self._barrier, self._rank = barrier, node.rank
        segment = window.allocate(node, 2 * max_bytes)
        self._slots = {
            np.dtype(kind): [
                [part[at : at + max_bytes].view(kind) for part in segment.parts]
                for at in (0, max_bytes)
            ]
            for kind in (np.float32, np.float64)
        }
        self._turn = 0

    def sum(self, x: Array) -> None:
        """Replace ``x``, of float32 or float64, by the sum over the ranks.

        All ranks add in the same order, so they get the same bits.
        """
        self._turn ^= 1
        slots, count = self._slots[x.dtype][self._turn], x.size
        flat = x if x.ndim == 1 else x.reshape(count)
        slots[self._rank][:count] = flat
        self._barrier.wait()
        np.add(slots[0][:count], slots[1][:count], out=flat)
        for slot in slots[2:]:
            flat += slot[:count]
