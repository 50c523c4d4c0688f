"""Choose between a compiled loop and its NumPy reference.

A kernel is written twice: as a loop that numba compiles without the interpreter's lock, and
with NumPy. Both give the same bytes; the tests compare them.
"""

import functools
import importlib
import logging
import threading
from collections.abc import Callable
from typing import Any

log = logging.getLogger("hpc_dl.compress")

#: Functions that loops call, until the first loop is compiled.
_called: list[Callable[..., Any]] = []
_lock = threading.Lock()


def called_by_loops(function: Callable[..., Any]) -> Callable[..., Any]:
    """Let loops call a plain function; it becomes a part of them, and costs them nothing.

    A cached loop is compiled anew when its own file changes, not when another file does: a
    function that may change must be in the file of the loops that call it.
    """
    _called.append(function)
    return function


@functools.cache
def _numba() -> Any:
    try:
        return importlib.import_module("numba")
    except ImportError as error:
        log.warning(
            "compression kernels run in NumPy, several times slower: %s; install "
            "'hpc_dl[kernels]' to have them compiled",
            error,
        )
        return None


def available() -> bool:
    """Tell whether loops are compiled."""
    return _numba() is not None


def compiled(loop: Callable[..., Any]) -> Any:
    """Compile a loop; it may be called by other loops. None without numba.

    Call this when the kernel is first used: importing this package does not import numba.
    """
    numba = _numba()
    if numba is None:
        return None
    with _lock:
        while _called:
            importlib.import_module("numba.extending").register_jitable(_called.pop())
    try:
        return numba.njit(nogil=True, cache=True)(loop)
    except RuntimeError:  # no folder that may be written to: compile in each process
        return numba.njit(nogil=True)(loop)


class Kernel:
    """A function that runs compiled where it can, and in NumPy elsewhere."""

    def __init__(self, loop: Callable[..., Any], reference: Callable[..., Any]):
        self.loop, self.reference = loop, reference

    @functools.cached_property
    def fastest(self) -> Callable[..., Any]:
        """The compiled loop, or the reference without numba."""
        function: Callable[..., Any] = compiled(self.loop) or self.reference
        return function

    def __call__(self, *args: Any) -> Any:
        """Run it."""
        return self.fastest(*args)
