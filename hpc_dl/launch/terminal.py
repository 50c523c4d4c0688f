"""A terminal for rank 0, so that its progress bar draws itself as if it were alone."""

import contextlib
import fcntl
import os
import pty
import signal
import struct
import termios
from collections.abc import Iterator
from dataclasses import dataclass
from types import FrameType


@dataclass(frozen=True)
class Terminal:
    """A pseudo terminal: rank 0 opens ``path``, the launcher reads ``master``."""

    master: int
    slave: int
    path: str

    def read(self) -> bytes:
        """Return what rank 0 drew since the last call, without waiting."""
        with contextlib.suppress(BlockingIOError, OSError):
            return os.read(self.master, 1 << 16)
        return b""


@contextlib.contextmanager
def opened(screen: int) -> Iterator[Terminal]:
    """Make a terminal of the same size as the one behind the descriptor ``screen``."""
    master, slave = pty.openpty()
    try:
        attributes = termios.tcgetattr(slave)
        attributes[1] &= ~termios.OPOST  # the user's terminal translates line ends already
        attributes[3] &= ~termios.ECHO
        termios.tcsetattr(slave, termios.TCSANOW, attributes)
        os.set_blocking(master, False)
        _copy_size(screen, slave)
        with _following_size(screen, slave):
            yield Terminal(master, slave, os.ttyname(slave))
    finally:
        os.close(master)
        os.close(slave)


def _copy_size(source: int, target: int) -> None:
    empty = struct.pack("HHHH", 0, 0, 0, 0)
    with contextlib.suppress(OSError):
        fcntl.ioctl(target, termios.TIOCSWINSZ, fcntl.ioctl(source, termios.TIOCGWINSZ, empty))


@contextlib.contextmanager
def _following_size(source: int, target: int) -> Iterator[None]:
    def on_resize(_number: int, _frame: FrameType | None) -> None:
        _copy_size(source, target)

    before = signal.signal(signal.SIGWINCH, on_resize)
    try:
        yield
    finally:
        signal.signal(signal.SIGWINCH, before)
