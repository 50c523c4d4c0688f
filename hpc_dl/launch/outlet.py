"""Write to a stream whose reader may be slow, without ever waiting for it."""

import contextlib
import os
import select
from typing import BinaryIO

#: Bytes that may wait for the reader before the ranks have to.
CAPACITY = 1 << 20


class Outlet:
    """A stream that takes everything at once and writes it when its reader is ready.

    A pager that is not scrolled must not keep the launcher from its ranks, its signals and its
    time limit. The stream itself stays as it is: the shell may share it, and would find it
    non-blocking. Nor does a thread write it: the kernel would report the launcher's death to
    mpirun once for each thread, and at the second SIGTERM mpirun leaves its ranks behind.

    Args:
        stream: where to write; one without a file descriptor is written at once.
    """

    def __init__(self, stream: BinaryIO) -> None:
        self._stream = stream
        self._descriptor = -1
        with contextlib.suppress(AttributeError, OSError):
            self._descriptor = stream.fileno()
            stream.flush()
        self._waiting = bytearray()
        # A pipe that is ready takes so much without making the writer wait; so does a terminal.
        self._most = 256 if self._descriptor >= 0 and os.isatty(self._descriptor) else 4096
        self._poll = select.poll()
        if self._descriptor >= 0:
            self._poll.register(self._descriptor, select.POLLOUT)

    @property
    def full(self) -> bool:
        """Tell whether so much waits that no more should come for now."""
        return len(self._waiting) > CAPACITY

    @property
    def waiting_for(self) -> int | None:
        """Return the descriptor that is not ready to take what waits; None if nothing waits."""
        return self._descriptor if self._waiting else None

    def write(self, data: bytes) -> None:
        """Take data to be written by `pump` and `close`."""
        if self._descriptor < 0:
            self._stream.write(data)
            self._stream.flush()
        else:
            self._waiting += data

    def pump(self, patience: float = 0.0) -> None:
        """Write what the reader takes.

        Args:
            patience: seconds to wait for it, each time that it takes nothing; below 0: for ever.

        Raises:
            OSError: the reader has gone, or the disk is full.
        """
        done = 0
        try:
            while done < len(self._waiting) and self._poll.poll(patience * 1000):
                with contextlib.suppress(BlockingIOError):  # non-blocking, and taken meanwhile
                    piece = self._waiting[done : done + self._most]
                    done += os.write(self._descriptor, piece)
        finally:
            del self._waiting[:done]

    def close(self, patience: float | None) -> int:
        """Wait until everything is written.

        Args:
            patience: give up when nothing was taken for so many seconds; None to wait for ever.

        Returns:
            the number of bytes that were given up.
        """
        self.pump(-1.0 if patience is None else patience)
        return len(self._waiting)
