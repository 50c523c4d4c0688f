"""Find and end every process of a job, also those that its ranks started."""

import contextlib
import ctypes
import os
import signal
import time
from pathlib import Path

from hpc_dl.launch.channel import SOCKET

_PR_SET_PDEATHSIG = 1
#: Loaded here: `die_with_parent` runs between fork and exec, where little may be done.
_LIBC = ctypes.CDLL(None, use_errno=True)


def die_with_parent(parent: int | None = None) -> None:
    """Ask the kernel to send this process SIGTERM when its parent dies, however it dies.

    Args:
        parent: the process that is to be the parent; if it has died already, this one ends.
    """
    _LIBC.prctl(_PR_SET_PDEATHSIG, int(signal.SIGTERM))
    if parent is not None and os.getppid() != parent:
        os._exit(128 + signal.SIGTERM)


def marked(socket_path: str) -> list[int]:
    """Return the running processes whose environment names this job's socket."""
    mark = f"{SOCKET}={socket_path}".encode()
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):  # gone meanwhile, or another user's
            if mark in (folder / "environ").read_bytes().split(b"\0"):
                found.append(int(folder.name))
    return found


def send(processes: list[int], number: int) -> None:
    """Send a signal to processes, some of which may have ended meanwhile."""
    for process in processes:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.kill(process, number)


def sweep(socket_path: str, patience: float = 2.0) -> None:
    """Kill what is left of a job, until nothing is (or for ``patience`` seconds)."""
    deadline = time.monotonic() + patience
    while time.monotonic() < deadline:
        left = marked(socket_path)
        if not left:
            return
        send(left, signal.SIGKILL)
        time.sleep(0.02)
