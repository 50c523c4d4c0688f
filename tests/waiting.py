"""Wait for what happens soon, and not at once."""

import gc
import time
from collections.abc import Callable
from weakref import ref


def wait_until(holds: Callable[[], bool], seconds: float) -> bool:
    """Wait until a condition holds; tell whether it did in time."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if holds():
            return True
        time.sleep(0.05)
    return holds()


def is_freed(kept: ref) -> bool:
    """Tell whether the garbage collector frees an object; the communication thread may be late."""

    def gone() -> bool:
        gc.collect()
        return kept() is None

    return wait_until(gone, 10.0)
