"""Memory that the ranks of a node share, and the views that each has of the others' parts."""

import os
from typing import Any, NamedTuple

import numpy as np
from mpi4py import MPI
from numpy.typing import NDArray

from hpc_dl.comm.protocol import Array
from hpc_dl.errors import HpcDlError

#: Where Open MPI and MPICH keep shared windows on Linux.
SHARED_MEMORY = "/dev/shm"


class Segment(NamedTuple):
    """One shared allocation: a part for each rank of the node, all of the same size."""

    window: Any
    parts: list[NDArray[np.uint8]]
    address: int
    nbytes: int

    def views(self, flat: Array) -> list[Array] | None:
        """Return every rank's counterpart of ``flat`` if it lies in this rank's part."""
        start = flat.ctypes.data - self.address
        if start < 0 or start + flat.nbytes > self.nbytes:
            return None
        return [part[start : start + flat.nbytes].view(flat.dtype) for part in self.parts]


def _free_bytes() -> int:
    """Return the room for shared windows on this node, or -1 where it cannot be seen."""
    if not os.path.isdir(SHARED_MEMORY):
        return -1
    stat = os.statvfs(SHARED_MEMORY)
    return stat.f_bavail * stat.f_frsize


def _check_room(node: MPI.Intracomm, nbytes: int) -> None:
    """Refuse, on all ranks of the node, what would be a bus error at the first touch."""
    room = np.array([_free_bytes()], np.int64)
    node.Bcast(room)
    needed, free = nbytes * node.size, int(room[0])
    if 0 <= free < needed:
        raise HpcDlError(
            f"the {node.size} ranks of this node need {needed >> 20} MiB of shared memory; "
            f"{SHARED_MEMORY} has {free >> 20} MiB free. Enlarge it (in a container: "
            "--shm-size or --ipc=host), or start fewer ranks on a node"
        )


def allocate(node: MPI.Intracomm, nbytes: int) -> Segment:
    """Allocate ``nbytes`` for each rank of ``node``, zeroed; all of them call it alike."""
    _check_room(node, nbytes)
    window = MPI.Win.Allocate_shared(nbytes, 1, comm=node)
    window.Lock_all(MPI.MODE_NOCHECK)
    parts = [
        np.frombuffer(window.Shared_query(rank)[0], np.uint8)[:nbytes]  # type: ignore[call-overload]
        for rank in range(node.size)
    ]
    mine = parts[node.rank]
    mine[:] = 0
    node.Barrier()
    return Segment(window, parts, mine.ctypes.data, nbytes)


def free(segment: Segment) -> None:
    """Give the memory back; all ranks of the node call it. No view may be used afterwards."""
    segment.window.Unlock_all()
    segment.window.Free()
