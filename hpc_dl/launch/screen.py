"""Put the output of many ranks on one screen, whole line by whole line."""

import os
from typing import BinaryIO

from hpc_dl.launch.outlet import Outlet

#: A rank that writes this much without a line end gets a line end.
LONGEST_LINE = 1 << 20

#: Bytes of an unfinished line that are kept to draw it again.
_LONGEST_BAR = 4096
_CLEAR_LINE = b"\r\x1b[2K"
_SHOW_CURSOR = b"\x1b[?25h"
_COLOURS = (36, 33, 32, 35, 34, 96, 93, 92, 95, 94)


class LineSplitter:
    """Cut a byte stream into lines, keeping what a progress bar last drew of each."""

    def __init__(self) -> None:
        self._rest = b""

    def feed(self, data: bytes) -> list[bytes]:
        """Return the lines that ``data`` completes, without their line ends."""
        *lines, self._rest = (self._rest + data).split(b"\n")
        if len(self._rest) > LONGEST_LINE:
            lines.append(self._rest)
            self._rest = b""
        return [visible(line) for line in lines]

    def close(self) -> list[bytes]:
        """Return the last, unfinished line, if there is one."""
        rest, self._rest = self._rest, b""
        return [visible(rest)] if rest else []


def visible(line: bytes) -> bytes:
    r"""Return what a terminal would still show of a line that was redrawn with ``\r``.

    >>> visible(b"10%\r20%\r30%")
    b'30%'
    """
    return line.rstrip(b"\r").rpartition(b"\r")[2]


class Screen:
    """The one writer to the user's stdout and stderr.

    Args:
        out: where the ranks' stdout goes.
        err: where their stderr and the launcher's own words go.
        prefix: begin each line with its rank, as in ``[1] text``.
        colour: colour that prefix, on stdout and on stderr.
        terminal: rank 0 draws on a terminal (`draw`). The lines of the others wait until its
            line is finished; if it stays unfinished, as a progress bar does, they go above it
            and it is drawn again below them.
    """

    def __init__(
        self,
        out: BinaryIO,
        err: BinaryIO,
        *,
        prefix: bool,
        colour: tuple[bool, bool],
        terminal: bool,
    ) -> None:
        #: Both end in one file; one outlet then keeps their order.
        self.merged = _same_file(out, err)
        self._out = Outlet(out)
        self._err = self._out if self.merged else Outlet(err)
        self._prefix = prefix
        self._colour = colour
        self._terminal = terminal
        #: What is to be seen of the line that rank 0 is drawing.
        self._drawn = b""
        self._held: list[tuple[Outlet, bytes]] = []

    @property
    def full(self) -> bool:
        """Tell whether the reader is so far behind that no more should come for now."""
        return self._out.full or self._err.full

    @property
    def waiting_for(self) -> set[int]:
        """Return the descriptors that must get ready before more can be shown."""
        return {
            outlet.waiting_for
            for outlet in (self._out, self._err)
            if outlet.waiting_for is not None
        }

    def pump(self) -> None:
        """Show what the user's side takes now.

        Raises:
            OSError: the reader has gone, or the disk is full.
        """
        self._out.pump()
        self._err.pump()

    def close(self, patience: float | None = None) -> None:
        """Wait until everything is shown.

        Args:
            patience: give up on a reader that takes nothing for so many seconds, and say so.
        """
        self.pump()  # an error is read before the rest of the output, if that takes its time
        dropped = self._out.close(patience)
        if dropped:
            note = f"hpc-dl launch: nobody read the last {dropped} bytes of the output\n"
            self._err.write(note.encode())
        self._err.close(patience)

    def line(self, text: bytes, rank: int | None = None, *, error: bool = False) -> None:
        """Write one line, of a rank or (without one) of the launcher."""
        if rank is not None and self._prefix:
            text = self._mark(rank, self._colour[error]) + text
        stream = self._err if error else self._out
        if self._drawn:
            self._held.append((stream, text + b"\n"))
        else:
            stream.write(text + b"\n")

    def draw(self, data: bytes) -> None:
        """Pass on what rank 0 draws on its terminal, byte for byte."""
        if not data:
            return
        self._out.write(data)
        _, end, rest = data.rpartition(b"\n")
        self._drawn = visible(rest if end else self._drawn + rest)[-_LONGEST_BAR:]
        if not self._drawn:
            self._release()

    def settle(self) -> None:
        """Wait no longer for rank 0 to finish its line: show what waited for it."""
        if self._held:
            self._out.write(_CLEAR_LINE)
            self._release()
            self._out.write(self._drawn)

    def restore(self) -> None:
        """Leave the terminal as a shell expects it after rank 0 was cut off while drawing."""
        self.settle()
        if self._terminal:
            self._out.write(_SHOW_CURSOR + (b"\n" if self._drawn else b""))
            self._drawn = b""

    def _release(self) -> None:
        held, self._held = self._held, []
        for stream, text in held:
            stream.write(text)

    @staticmethod
    def _mark(rank: int, colour: bool) -> bytes:
        mark = b"[%d] " % rank
        if colour:
            return b"\x1b[%dm%s\x1b[0m" % (_COLOURS[rank % len(_COLOURS)], mark)
        return mark


def _same_file(out: BinaryIO, err: BinaryIO) -> bool:
    try:
        return os.path.samestat(os.fstat(out.fileno()), os.fstat(err.fileno()))
    except OSError:  # not backed by a file
        return False
