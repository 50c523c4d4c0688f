"""The communication thread: runs asynchronous collectives in the order they were asked for."""

import queue
import threading
from collections.abc import Callable
from typing import Any


class QueuedWork:
    """A call waiting for, or done by, the communication thread."""

    def __init__(self, call: Callable[[], Any]):
        self._call = call
        self.finished = threading.Event()
        self._result: Any = None
        self._error: BaseException | None = None

    def run(self) -> None:
        """Make the call and keep what it returned or raised."""
        try:
            self._result = self._call()
        except BaseException as error:
            self._error = error
        finally:
            self.finished.set()

    def done(self) -> bool:
        """Tell whether the call has returned or raised."""
        return self.finished.is_set()

    def wait(self) -> Any:
        """Block until the call has ended; return its result or raise its error."""
        self.finished.wait()
        if self._error is not None:
            raise self._error
        return self._result


class CommQueue:
    """Runs calls one after the other: on a thread if asynchronous, in the caller otherwise.

    The order is that of the calls to ``submit`` and ``run``, so ranks that make the same
    calls in the same order meet in the same collectives. A synchronous call with nothing
    pending runs in the caller, which saves two hand-overs between threads.
    """

    def __init__(self, name: str, threaded: bool = True):
        self._name = name
        self._threaded = threaded
        self._calls: queue.SimpleQueue[QueuedWork | None] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None
        self._last: threading.Event | None = None
        # Held while a call runs: two threads of a rank must never be in collectives at once.
        self.running = threading.RLock()
        self._beginning = threading.Lock()

    def submit(self, call: Callable[[], Any]) -> QueuedWork:
        """Run ``call`` on the communication thread, after all calls before it."""
        work = QueuedWork(call)
        if not self._threaded:
            with self.running:
                work.run()
            return work
        self._begin()
        self._last = work.finished
        self._calls.put(work)
        return work

    def _begin(self) -> None:
        with self._beginning:
            if self._thread is None:
                self._thread = threading.Thread(target=self._serve, name=self._name, daemon=True)
                self._thread.start()

    def run(self, call: Callable[[], Any]) -> Any:
        """Run ``call`` after all calls before it and return its result."""
        if not self.idle():
            return self.submit(call).wait()
        with self.running:
            return call()

    def idle(self) -> bool:
        """Tell whether a call made now by this thread would come after all those before it."""
        return self._last is None or self._last.is_set() or self.is_here()

    def is_here(self) -> bool:
        """Tell whether this is the communication thread, so a call is part of another one."""
        return threading.current_thread() is self._thread

    def _serve(self) -> None:
        while (work := self._calls.get()) is not None:
            with self.running:
                work.run()
            del work  # What it was made of and what came out lives no longer than it is needed.

    def close(self) -> None:
        """Finish what is pending and end the thread."""
        if self._thread is not None:
            self._calls.put(None)
            self._thread.join()
            self._thread = None
