"""Messages over MPI."""

from collections.abc import Callable

import numpy as np
from mpi4py import MPI

from hpc_dl.comm.mailbox import too_long
from hpc_dl.comm.protocol import ANY, Array, Status
from hpc_dl.errors import OptionError


class MpiMessage:
    """A message under way; it keeps its memory alive."""

    def __init__(self, request: MPI.Request, flat: Array):
        self._request, self._flat = request, flat
        self._status: Status | None = None
        self._error: OptionError | None = None

    def done(self) -> bool:
        """Tell whether ``wait`` would return at once."""
        return self._complete(self._request.Test)

    def wait(self) -> Status:
        """Block until it is complete."""
        self._complete(self._request.Wait)
        if self._error is not None:
            raise self._error
        assert self._status is not None
        return self._status

    def _complete(self, ask: Callable[[MPI.Status], bool]) -> bool:
        if self._status is None and self._error is None:
            status = MPI.Status()
            try:
                if ask(status):
                    self._status = read_status(status)
            except MPI.Exception as error:
                if error.Get_error_class() != MPI.ERR_TRUNCATE:
                    raise
                self._error = too_long(self._flat.nbytes, status.Get_source(), status.Get_tag())
        return self._status is not None or self._error is not None


def receive(comm: MPI.Comm, flat: Array, source: int, tag: int) -> Status:
    """Wait for a message, look at its size, and write it to the front of ``flat``.

    Open MPI 5.0 writes a message that is too long beyond the end of the memory before it
    reports the error (from about 4 KB on, where it copies from process to process in one
    go), so a receive that can look first does.
    """
    found = MPI.Status()
    message = comm.Mprobe(*wildcards(source, tag), found)
    status = read_status(found)
    long = status.nbytes > flat.nbytes
    room = np.empty(status.nbytes, np.uint8) if long else flat
    message.Recv([room, status.nbytes, MPI.BYTE])
    if long:
        raise too_long(flat.nbytes, status.source, status.tag)
    return status


def wildcards(source: int, tag: int) -> tuple[int, int]:
    """Write ANY as MPI does."""
    return (
        MPI.ANY_SOURCE if source == ANY else source,
        MPI.ANY_TAG if tag == ANY else tag,
    )


def read_status(status: MPI.Status) -> Status:
    """Say where a message came from, and its bytes."""
    return Status(status.Get_source(), status.Get_tag(), status.Get_count(MPI.BYTE))
