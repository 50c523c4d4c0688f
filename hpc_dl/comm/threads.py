"""Several ranks in one process, a thread each: for tests, documentation and small trials.

All ranks share one address space, so every array is already where a shared window would
put it and ranks reduce each other's arrays directly.
"""

import threading
from collections.abc import Callable
from typing import Any, TypeVar

import numpy as np

from hpc_dl.comm.base import BaseCommunicator
from hpc_dl.comm.kernels import combine, reduce_in_place, share
from hpc_dl.comm.mailbox import Mailbox, PeerFailedError
from hpc_dl.comm.protocol import ANY, Array, Op, Status, Work
from hpc_dl.comm.queue import QueuedWork
from hpc_dl.comm.stall import Arrivals

T = TypeVar("T")


class Group:
    """What the ranks of one group share."""

    def __init__(self, size: int):
        self.size = size
        self.barrier = threading.Barrier(size)
        self.slots: list[Any] = [None] * size
        self.mailboxes = [Mailbox() for _ in range(size)]
        self.counters = [memoryview(bytearray(8)).cast("q") for _ in range(size)]
        self.children: list[Group] = []

    def abort(self) -> None:
        """Wake every rank that waits in this group, or in one split from it."""
        self.barrier.abort()
        for mailbox in self.mailboxes:
            mailbox.abort()
        for child in self.children:
            child.abort()


class ThreadsCommunicator(BaseCommunicator):
    """The view that one thread has of its group."""

    name = "threads"

    def __init__(self, group: Group, rank: int):
        super().__init__(rank, group.size)
        self._group = group
        self.watch.arrivals = Arrivals(group.counters, range(group.size), rank)

    def _meet(self) -> None:
        try:
            self._group.barrier.wait()
        except threading.BrokenBarrierError:
            raise PeerFailedError(
                f"rank {self.rank}: another rank of this group failed; its error is the cause"
            ) from None

    def _share(self, mine: T) -> list[T]:
        """Return what every rank passed. Meet again before any of it is reused."""
        self._group.slots[self.rank] = mine
        self._meet()
        return list(self._group.slots)

    def _allreduce(self, flat: Array, op: Op, scale: float) -> None:
        buffers = self._share(flat)
        lo, hi = share(len(flat), self.rank, self.size)
        reduce_in_place(buffers, lo, hi, op, scale)
        self._meet()

    def _allgather(self, x: Array) -> list[Array]:
        arrays = [array.copy() for array in self._share(x)]
        self._meet()
        return arrays

    def _broadcast(self, flat: Array, root: int) -> None:
        source = self._share(flat)[root]
        if self.rank != root:
            np.copyto(flat, source)
        self._meet()

    def _alltoall(self, parts: list[Array]) -> list[Array]:
        arrays = [theirs[self.rank].copy() for theirs in self._share(parts)]
        self._meet()
        return arrays

    def _exchange(self, row: Array) -> Array:
        rows = np.stack(self._share(row))
        self._meet()
        return rows

    def _barrier(self) -> None:
        self._meet()

    def _reduce_parts(self, parts: list[Array], op: Op, scale: float) -> Array:
        return combine(parts, op, scale)

    def split(self, color: int | None, key: int = 0) -> "ThreadsCommunicator | None":
        """Form sub-groups of the ranks that give the same color, ordered by key, then rank."""

        self._check_color(color)

        def form() -> tuple[Group, int] | None:
            calls = self._share((color, key, self.rank))
            self._meet()
            members = [r for c, _, r in sorted(calls, key=lambda call: call[1:]) if c == color]
            leads = color is not None and self.rank == members[0]
            groups = self._share(Group(len(members)) if leads else None)
            self._meet()
            if color is None:
                return None
            group = groups[members[0]]
            assert group is not None
            if leads:
                self._group.children.append(group)
            return group, members.index(self.rank)

        place: tuple[Group, int] | None = self._queue.run(form)
        return None if place is None else ThreadsCommunicator(*place)

    # --- messages -----------------------------------------------------------------

    def send(self, x: Array, dest: int, tag: int = 0) -> None:
        """Send a copy of ``x``; returns at once."""
        self._check_address(dest, "dest", tag)
        self._group.mailboxes[dest].put(self.rank, tag, self._readable(x, "send").tobytes())

    def recv(self, x: Array, source: int = ANY, tag: int = ANY) -> Status:
        """Wait for a message and write it to the front of ``x``."""
        status: Status = self.irecv(x, source, tag).wait()
        return status

    def isend(self, x: Array, dest: int, tag: int = 0) -> Work:
        """Send a copy of ``x``; the work is complete."""
        self.send(x, dest, tag)
        work = QueuedWork(lambda: None)
        work.run()
        return work

    def irecv(self, x: Array, source: int = ANY, tag: int = ANY) -> Work:
        """Start to receive into ``x``."""
        self._check_address(source, "source", tag)
        room = self._flat(x, "irecv").view(np.uint8)
        return self._group.mailboxes[self.rank].take(room, source, tag)

    def iprobe(self, source: int = ANY, tag: int = ANY) -> Status | None:
        """Describe a message that ``recv`` would return at once, if there is one."""
        self._check_address(source, "source", tag)
        return self._group.mailboxes[self.rank].peek(source, tag)


def run_threads(size: int, function: Callable[[ThreadsCommunicator], T]) -> list[T]:
    """Run ``function(communicator)`` on ``size`` ranks and return their results, by rank.

    Raises:
        The error of the first rank that failed by itself; the others are woken and ended.
    """
    group = Group(size)
    results: list[Any] = [None] * size
    errors: list[BaseException | None] = [None] * size

    def rank_main(rank: int) -> None:
        communicator = ThreadsCommunicator(group, rank)
        try:
            results[rank] = function(communicator)
        except BaseException as error:
            errors[rank] = error
            group.abort()
        finally:
            communicator.close()

    threads = [threading.Thread(target=rank_main, args=(rank,)) for rank in range(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    raised = [error for error in errors if error is not None]
    causes = [error for error in raised if not isinstance(error, PeerFailedError)]
    if raised:
        raise (causes or raised)[0]
    return results
