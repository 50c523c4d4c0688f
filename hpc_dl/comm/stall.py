"""Say so when a collective waits too long: which one, on which rank, and the usual causes."""

import logging
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from hpc_dl.comm.abort import end_job

log = logging.getLogger("hpc_dl.comm")

#: Seconds after which a waiting collective is reported; again after each doubling.
WARN_SECONDS = 60.0

CAUSES = (
    "the other ranks have not called it. Usual causes: a collective inside `if rank() == 0`, "
    "ranks with different numbers of batches (call join()), or a rank that hangs"
)


class Watch:
    """Watches the collective that a communicator is in."""

    def __init__(self, name: str, rank: int, missing: Callable[[], list[int]] = list):
        self.warn_seconds = WARN_SECONDS
        self.abort_seconds = 0.0
        self.missing = missing
        self._name, self._rank = name, rank
        self._current: tuple[str, Any, float] | None = None
        self._closing = threading.Event()
        self._thread: threading.Thread | None = None

    @contextmanager
    def over(self, what: str, x: Any) -> Iterator[None]:
        """Watch the body of the ``with``, which is the collective ``what`` on ``x``."""
        if self._thread is None:
            self._thread = threading.Thread(target=self._observe, daemon=True)
            self._thread.start()
        self._current = (what, x, time.monotonic())
        try:
            yield
        finally:
            self._current = None

    def _observe(self) -> None:
        due = self.warn_seconds
        while not self._closing.wait(min(1.0, self.warn_seconds / 4)):
            current = self._current
            waited = time.monotonic() - current[2] if current else 0.0
            if current is None or waited < self.warn_seconds:
                due = self.warn_seconds
                continue
            if waited >= due:
                due = 2 * waited
                log.warning("%s", self._report(current[0], current[1], waited))
            if 0 < self.abort_seconds <= waited:
                log.error(
                    "%s; ending the job after %.0f s (stall_abort)",
                    self._report(current[0], current[1], waited),
                    waited,
                )
                end_job(1)

    def _report(self, what: str, x: Any, waited: float) -> str:
        late = self.missing()
        who = f"rank(s) {', '.join(map(str, late))} are not there yet; " if late else ""
        shape, dtype = tuple(getattr(x, "shape", ())), getattr(x, "dtype", "")
        return (
            f"rank {self._rank} has waited {waited:.0f} s in {what}{shape} {dtype} over "
            f"{self._name!r}: {who}{CAUSES}"
        )

    def close(self) -> None:
        """End the watch."""
        self._closing.set()
