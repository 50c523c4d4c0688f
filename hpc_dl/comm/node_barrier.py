"""A barrier on shared memory that waits politely.

MPI's barriers spin: on a node filled with ranks, a communication thread that spins takes the
core from the thread that computes gradients. This one offers the core to others between looks,
after a moment sleeps between looks, and lets go of Python's lock all the while.
"""

import ctypes
import time

from mpi4py import MPI

from hpc_dl.comm import window

#: Looks without a sleep, a microsecond each if no other thread wants the core: the other
#: ranks are usually that near, or wait for this very core.
EAGER_LOOKS = 100
#: Seconds between later looks; the kernel rounds this up to its timer slack of 50 us.
NAP = 1e-5

#: A counter that each rank writes has a cache line of its own.
CACHE_LINE = 64


#: Python's own os.sched_yield keeps Python's lock, time.sleep(0) the core.
_yield_core = ctypes.CDLL(None).sched_yield


class NodeBarrier:
    """Each rank counts its arrivals where all ranks of the node can see the count."""

    def __init__(self, node: MPI.Intracomm):
        """Allocate the counters; all ranks of the node call this."""
        segment = window.allocate(node, CACHE_LINE)
        counters = [part.data.cast("q") for part in segment.parts]
        self._mine = counters[node.rank]
        self._others = counters[: node.rank] + counters[node.rank + 1 :]
        self._arrivals = 0
        self._fence = window.fence()

    def wait(self) -> None:
        """Return once all ranks of the node have called this as often as this one."""
        self._arrivals += 1
        # The fences order what was written to shared memory before the arrival, and what is
        # read from it afterwards.
        self._fence()
        self._mine[0] = self._arrivals
        for counter in self._others:
            looks = 0
            while counter[0] < self._arrivals:
                looks += 1
                if looks < EAGER_LOOKS:
                    _yield_core()
                else:
                    time.sleep(NAP)
        self._fence()
