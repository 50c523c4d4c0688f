"""Measure the time that training takes, without what lies between."""

import time


class Stopwatch:
    """Adds up the seconds between ``resume`` and ``pause``."""

    def __init__(self) -> None:
        self._sum = 0.0
        self._since: float | None = None

    def resume(self) -> None:
        """Go on; if it runs, nothing changes."""
        if self._since is None:
            self._since = time.perf_counter()

    def pause(self) -> None:
        """Stop; if it stands, nothing changes."""
        self._sum, self._since = self.seconds, None

    @property
    def seconds(self) -> float:
        """The seconds so far."""
        running = 0.0 if self._since is None else time.perf_counter() - self._since
        return self._sum + running
