"""All-reduce between nodes: a segmented ring for large buffers, a gather for small ones.

Patarasuk and Yuan, "Bandwidth optimal all-reduce algorithms for clusters of workstations"
(2009): each rank sends and receives 2 (n - 1) / n of the buffer. Each block is cut into
segments, and a segment goes on to the next rank as soon as it is reduced, so the wire is
busy while the processor adds.
"""

from collections.abc import Sequence

import numpy as np
from mpi4py import MPI

from hpc_dl.arrays import HALF_TYPES
from hpc_dl.comm import pairwise
from hpc_dl.comm.kernels import reduce_in_place, scale_in_place, share
from hpc_dl.comm.protocol import Array, Op

#: Bytes below which latency counts more than bandwidth.
SMALL_BYTES = 16 * 1024
SEGMENT_BYTES = 256 * 1024


def allreduce(comm: MPI.Comm, flat: Array, op: Op, scale: float = 1.0) -> None:
    """Combine the 1-D ``flat`` over the ranks of ``comm``, in place, times ``scale``.

    Every rank gets the same bytes. The order of the sum differs from block to block, but
    not from run to run.
    """
    if flat.nbytes <= SMALL_BYTES:
        _gathered(comm, flat, op, scale)
    elif flat.dtype in HALF_TYPES:
        _direct(comm, flat, op, scale)
    else:
        _ring(comm, flat, op)
        scale_in_place(flat, scale)


def _gathered(comm: MPI.Comm, flat: Array, op: Op, scale: float) -> None:
    everyone = np.empty((comm.size, len(flat)), flat.dtype)
    comm.Allgather([flat, flat.nbytes, MPI.BYTE], [everyone, flat.nbytes, MPI.BYTE])
    reduce_in_place(list(everyone), 0, len(flat), op, scale, out=[flat])


def _direct(comm: MPI.Comm, flat: Array, op: Op, scale: float) -> None:
    """Send each rank its block: as many bytes as a ring, and a sum that is rounded once.

    A ring would round 16-bit floats, and could overflow, at every hop.
    """
    blocks = [flat[slice(*share(len(flat), owner, comm.size))] for owner in range(comm.size)]
    mine = blocks[comm.rank]
    landing = np.empty((comm.size, len(mine)), flat.dtype)
    landing[comm.rank] = mine
    pairwise.alltoall(comm, blocks, list(landing), MPI.INT16_T)
    reduce_in_place(list(landing), 0, len(mine), op, scale, out=[mine])
    pairwise.allgather(comm, blocks, MPI.INT16_T)


def _segments(block: Array) -> list[Array]:
    step = SEGMENT_BYTES // block.itemsize
    return [block[start : start + step] for start in range(0, len(block), step)]


def _isend(comm: MPI.Comm, part: Array, tag: int) -> MPI.Request:
    return comm.Isend([part, part.nbytes, MPI.BYTE], (comm.rank + 1) % comm.size, tag)


def _irecvs(comm: MPI.Comm, parts: Sequence[Array], tag: int) -> list[MPI.Request]:
    source = (comm.rank - 1) % comm.size
    return [comm.Irecv([part, part.nbytes, MPI.BYTE], source, tag) for part in parts]


def _ring(comm: MPI.Comm, flat: Array, op: Op) -> None:
    size = comm.size
    blocks = [_segments(flat[slice(*share(len(flat), block, size))]) for block in range(size)]
    sends = [_isend(comm, part, 0) for part in blocks[comm.rank]]
    for step in range(2 * (size - 1)):
        block = blocks[(comm.rank - step - 1) % size]
        reducing = step < size - 1
        landing = [np.empty_like(part) for part in block] if reducing else block
        receives = _irecvs(comm, landing, step)
        onward: list[MPI.Request] = []
        for part, landed, receive in zip(block, landing, receives, strict=True):
            receive.Wait()
            if reducing:
                reduce_in_place([part, landed], 0, len(part), op, out=[part])
            if step < 2 * (size - 1) - 1:
                onward.append(_isend(comm, part, step + 1))
        MPI.Request.Waitall(sends)
        sends = onward
    MPI.Request.Waitall(sends)
