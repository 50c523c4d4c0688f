"""All-gather and all-to-all of arrays whose first dimensions differ, over MPI."""

import numpy as np
from mpi4py import MPI
from numpy.typing import NDArray

from hpc_dl.comm import pairwise
from hpc_dl.comm.protocol import Array

Counts = NDArray[np.int64]

#: Bytes from which an all-gather between nodes is bound by the links rather than by latency.
LARGE_BYTES = 64 * 1024


class RowType:
    """An MPI type of ``nbytes`` bytes, so that counts are rows and may pass 2 GiB."""

    def __init__(self, nbytes: int):
        self._nbytes = nbytes

    def __enter__(self) -> MPI.Datatype | None:
        self._type = MPI.BYTE.Create_contiguous(self._nbytes).Commit() if self._nbytes else None
        return self._type

    def __exit__(self, *_: object) -> None:
        if self._type is not None:
            self._type.Free()


def allgather(comm: MPI.Comm, pairs: MPI.Comm | None, x: Array, counts: Counts) -> list[Array]:
    """Return the arrays of all ranks.

    Args:
        pairs: for messages in pairs, where there are links between the ranks; else None.
        counts: rows of each rank.
    """
    everyone = np.empty((int(counts.sum()), *x.shape[1:]), x.dtype)
    parts = np.split(everyone, np.cumsum(counts)[:-1])
    with RowType(x.itemsize * int(np.prod(x.shape[1:]))) as row:
        if row is None:
            return parts
        if pairs is not None and everyone.nbytes >= LARGE_BYTES:
            parts[comm.rank][...] = x
            pairwise.allgather(pairs, parts, row)
        else:
            starts = np.cumsum(counts) - counts
            comm.Allgatherv([x, int(counts[comm.rank]), row], [everyone, (counts, starts), row])
    return parts


def alltoall(
    comm: MPI.Comm, pairs: MPI.Comm | None, parts: list[Array], counts: Counts
) -> list[Array]:
    """Send each rank its part; return what came from each.

    Args:
        pairs: as for ``allgather``.
        counts: rows that come from each rank.
    """
    shape, dtype = parts[0].shape[1:], parts[0].dtype
    incoming = np.empty((int(counts.sum()), *shape), dtype)
    received = np.split(incoming, np.cumsum(counts)[:-1])
    with RowType(dtype.itemsize * int(np.prod(shape))) as row:
        if row is None:
            return received
        if pairs is not None:
            received[comm.rank][...] = parts[comm.rank]
            pairwise.alltoall(pairs, parts, received, row)
        else:
            sent = np.array([len(part) for part in parts], np.int64)
            comm.Alltoallv(
                [np.concatenate(parts), (sent, np.cumsum(sent) - sent), row],
                [incoming, (counts, np.cumsum(counts) - counts), row],
            )
    return received
