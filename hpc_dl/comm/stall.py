"""Say so when a collective waits too long: which one, on which rank, and the usual causes."""

import logging
import threading
import time
from collections.abc import Sequence
from typing import Any

from hpc_dl.comm.abort import end_job

log = logging.getLogger("hpc_dl.comm")

#: Seconds after which a waiting collective is reported; again after each doubling.
WARN_SECONDS = 60.0

CAUSES = (
    "Usual causes: a collective inside `if rank() == 0`, ranks with different numbers of "
    "batches (call join()), or a rank that hangs"
)


class Arrivals:
    """How many collectives each rank of a node has entered, in memory that they share."""

    def __init__(self, counters: Sequence[memoryview], ranks: Sequence[int], mine: int):
        """Take one int64 counter for each of the ``ranks``; the ``mine``-th is this rank's."""
        self._counters, self._ranks = counters, ranks
        self._mine = counters[mine]

    def count(self) -> None:
        """Say that this rank enters one more collective."""
        self._mine[0] += 1

    def late(self) -> list[int]:
        """Return the ranks that have not entered the collective that this rank is in."""
        pairs = zip(self._ranks, self._counters, strict=True)
        return [rank for rank, counter in pairs if counter[0] < self._mine[0]]


class Watch:
    """Watches the collective that a communicator is in."""

    def __init__(self, name: str, rank: int, size: int):
        self.warn_seconds = WARN_SECONDS
        self.abort_seconds = 0.0
        self.arrivals: Arrivals | None = None
        """Of the ranks on this node, where the communicator shares memory with them."""
        self.elsewhere = False
        """Whether some ranks are on other nodes."""
        self._name, self._rank, self._size = name, rank, size
        self._current: tuple[str, Any] | None = None
        self._closing = threading.Event()
        self._thread: threading.Thread | None = None

    def begin(self, what: str, x: Any) -> None:
        """Start to watch the collective ``what`` on ``x``."""
        if self._thread is None:
            self._thread = threading.Thread(target=self._observe, daemon=True)
            self._thread.start()
        if self.arrivals is not None:
            self.arrivals.count()
        self._current = (what, x)

    def end(self) -> None:
        """Say that the collective is over."""
        self._current = None

    def _observe(self) -> None:
        """Look now and then whether the collective is still the same.

        So the collectives themselves need not ask for the time.
        """
        seen, since, due = None, 0.0, 0.0
        while not self._closing.wait(self._interval()):
            current, now = self._current, time.monotonic()
            if current is None or current is not seen:
                seen, since, due = current, now, self.warn_seconds
                continue
            waited = now - since
            if self.warn_seconds > 0 and due <= waited:
                due = 2 * waited
                log.warning("%s", self._report(*current, waited))
            if 0 < self.abort_seconds <= waited:
                report = self._report(*current, waited)
                log.error("%s; ending the job after %.0f s (stall abort)", report, waited)
                end_job(1)

    def _interval(self) -> float:
        limits = [s for s in (self.warn_seconds, self.abort_seconds) if s > 0]
        return min(1.0, *(s / 8 for s in limits)) if limits else 1.0

    def _report(self, what: str, x: Any, waited: float) -> str:
        shape, dtype = tuple(getattr(x, "shape", ())), getattr(x, "dtype", "")
        return (
            f"rank {self._rank} of {self._size} has waited {waited:.0f} s in {what}{shape} {dtype} "
            f"over {self._name!r}: {self._who()} have not called it. {CAUSES}"
        )

    def _who(self) -> str:
        late = self.arrivals.late() if self.arrivals is not None else []
        if late:
            return f"rank(s) {', '.join(map(str, late))}" + (
                " of this node (and perhaps others)" if self.elsewhere else ""
            )
        if self.arrivals is not None and self.elsewhere:
            return "all ranks of this node are there, but some on other nodes"
        return "other ranks"

    def close(self) -> None:
        """End the watch; the memory of ``arrivals`` may be freed afterwards."""
        self._closing.set()
        if self._thread is not None:
            self._thread.join()
            self._thread = None
