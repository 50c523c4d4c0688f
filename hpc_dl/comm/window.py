"""Memory that the ranks of a node share, and the views that each has of the others' parts.

A file in memory that is mapped by every rank and has no name any more. Unlike a window of MPI
it goes when its last view does, on each rank by itself: MPI frees windows that are left in
the order of its handles when the program ends, and ranks whose groups differ then wait for
each other for ever (seen with Open MPI 5.0).
"""

import functools
import mmap
import os
import secrets
import tempfile
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
from mpi4py import MPI
from numpy.typing import NDArray

from hpc_dl.comm.protocol import Array
from hpc_dl.errors import HpcDlError

#: Where Linux keeps files in memory.
SHARED_MEMORY = "/dev/shm"


class Segment(NamedTuple):
    """One shared allocation: a part for each rank of the node, all of the same size."""

    parts: list[NDArray[np.uint8]]
    memory: Any
    """The whole of it, as a buffer."""
    start: int
    """Where in it this rank's part begins."""
    address: int
    nbytes: int

    def own(self) -> NDArray[np.uint8]:
        """Return this rank's part as an array that lives as long as any view of it.

        A view of ``parts`` would keep alive what they all are views of.
        """
        return np.frombuffer(self.memory, np.uint8, self.nbytes, self.start)

    def views(self, flat: Array) -> list[Array] | None:
        """Return every rank's counterpart of ``flat`` if it lies in this rank's part."""
        start = flat.ctypes.data - self.address
        if start < 0 or start + flat.nbytes > self.nbytes:
            return None
        return [part[start : start + flat.nbytes].view(flat.dtype) for part in self.parts]


def allocate(node: MPI.Intracomm, nbytes: int) -> Segment:
    """Allocate ``nbytes`` for each rank of ``node``, zeroed; all of them call it alike.

    Raises:
        HpcDlError: on all ranks of the node: there is not that much, or no shared memory.
    """
    if node.size == 1:
        alone = np.zeros(nbytes, np.uint8)
        return Segment([alone], alone.data, 0, alone.ctypes.data, nbytes)
    # Parts begin on pages of their own: each rank's pages are then near its core.
    stride = -(-nbytes // mmap.PAGESIZE) * mmap.PAGESIZE
    file = _open_shared(node)
    try:
        missing = _reserve(file, node.rank * stride, stride)
        _agree(node, missing is None, _no_room(node.size, nbytes, missing))
        memory = mmap.mmap(file, node.size * stride)
    finally:
        os.close(file)
    whole = np.frombuffer(memory, np.uint8)
    parts = [whole[rank * stride :][:nbytes] for rank in range(node.size)]
    return Segment(parts, memory, node.rank * stride, parts[node.rank].ctypes.data, nbytes)


def _folder() -> str:
    return SHARED_MEMORY if os.path.isdir(SHARED_MEMORY) else tempfile.gettempdir()


def _open_shared(node: MPI.Intracomm) -> int:
    """Open one new file on all ranks of the node, and take its name away."""
    name = np.zeros(64, np.uint8)
    if node.rank == 0:
        text = f"hpc_dl.{secrets.token_hex(16)}".encode()
        name[: len(text)] = np.frombuffer(text, np.uint8)
    node.Bcast(name)
    path = os.path.join(_folder(), name.tobytes().rstrip(b"\0").decode())
    file, error = -1, None
    if node.rank == 0:
        file, error = _open(path, os.O_CREAT | os.O_EXCL)
    node.Barrier()
    if node.rank > 0:
        file, error = _open(path, 0)
    try:
        _agree(
            node,
            error is None,
            f"the ranks of this node cannot share files in {_folder()} ({error or 'on another'}); "
            "start them in one container, or with --ipc=host",
        )
    except HpcDlError:
        if file >= 0:
            os.close(file)
        raise
    finally:
        if node.rank == 0 and file >= 0:
            os.unlink(path)
    return file


def _open(path: str, flags: int) -> tuple[int, OSError | None]:
    try:
        return os.open(path, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW | flags, 0o600), None
    except OSError as error:
        return -1, error


def _reserve(file: int, start: int, nbytes: int) -> OSError | None:
    """Take the memory now: later, its lack would be a bus error at the first touch."""
    try:
        os.posix_fallocate(file, start, nbytes)
    except OSError as error:
        return error
    return None


def _no_room(ranks: int, nbytes: int, error: OSError | None) -> str:
    stat = os.statvfs(_folder())
    return (
        f"the {ranks} ranks of this node need {ranks * nbytes >> 20} MiB of shared memory; "
        f"{_folder()} has {stat.f_bavail * stat.f_frsize >> 20} MiB free "
        f"({error or 'for another rank'}). Enlarge it (in a container: --shm-size or --ipc=host), "
        "or start fewer ranks on a node"
    )


def _agree(node: MPI.Intracomm, fine: bool, message: str) -> None:
    """Raise on all ranks of the node if it is not fine on one."""
    everyone = np.array([fine], np.int8)
    node.Allreduce(MPI.IN_PLACE, everyone, MPI.MIN)
    if not everyone[0]:
        raise HpcDlError(message)


@functools.cache
def fence() -> Callable[[], None]:
    """Return a function that orders what this rank reads and writes in shared memory before
    and after it is called."""
    own = MPI.Win.Allocate_shared(1, 1, comm=MPI.COMM_SELF)
    own.Lock_all(MPI.MODE_NOCHECK)
    return own.Sync
