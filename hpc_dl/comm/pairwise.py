"""All-to-all and all-gather in which each rank sends to one other at a time.

In round s rank r sends to r + s and receives from r - s, so each link carries one message in
each direction. Where all ranks send to all at once, messages of several senders meet at the
link of each receiver: switches drop packets, and TCP waits before it sends them again (Thakur,
Rabenseifner and Gropp, "Optimization of collective communication operations in MPICH", 2005;
on incast: Phanishayee et al., FAST 2008).
"""

from collections.abc import Sequence

from mpi4py import MPI

from hpc_dl.comm.protocol import Array


def alltoall(
    comm: MPI.Comm, outgoing: Sequence[Array], incoming: Sequence[Array], item: MPI.Datatype
) -> None:
    """Send each rank its part, and write what comes from each rank to its place.

    Args:
        comm: of these exchanges alone: messages have no tag of their own.
        outgoing: 1-D or flat in memory, by rank; that of this rank is not copied.
        incoming: by rank.
        item: what counts are in; a length is that of the first dimension.
    """
    for shift in range(1, comm.size):
        dest, source = (comm.rank + shift) % comm.size, (comm.rank - shift) % comm.size
        comm.Sendrecv(
            [outgoing[dest], len(outgoing[dest]), item],
            dest,
            0,
            [incoming[source], len(incoming[source]), item],
            source,
            0,
        )


def allgather(comm: MPI.Comm, parts: Sequence[Array], item: MPI.Datatype) -> None:
    """Write each rank's part to ``parts`` of all ranks; each has written its own."""
    alltoall(comm, [parts[comm.rank]] * comm.size, parts, item)
