"""Put the output of many ranks on one screen, whole line by whole line."""

from typing import BinaryIO

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
        colour: colour that prefix.
        terminal: rank 0 draws on a terminal (`draw`). The lines of the others wait until its
            line is finished; if it stays unfinished, as a progress bar does, they go above it
            and it is drawn again below them.
    """

    def __init__(
        self, out: BinaryIO, err: BinaryIO, *, prefix: bool, colour: bool, terminal: bool
    ) -> None:
        self._out = out
        self._err = err
        self._prefix = prefix
        self._colour = colour
        self._terminal = terminal
        #: What is to be seen of the line that rank 0 is drawing.
        self._drawn = b""
        self._held: list[tuple[BinaryIO, bytes]] = []

    def line(self, text: bytes, rank: int | None = None, *, error: bool = False) -> None:
        """Write one line, of a rank or (without one) of the launcher."""
        if rank is not None and self._prefix:
            text = self._mark(rank) + text
        stream = self._err if error else self._out
        if self._drawn:
            self._held.append((stream, text + b"\n"))
        else:
            self._write(stream, text + b"\n")

    def draw(self, data: bytes) -> None:
        """Pass on what rank 0 draws on its terminal, byte for byte."""
        if not data:
            return
        self._write(self._out, data)
        _, end, rest = data.rpartition(b"\n")
        self._drawn = visible(rest if end else self._drawn + rest)[-_LONGEST_BAR:]
        if not self._drawn:
            self._release()

    def settle(self) -> None:
        """Wait no longer for rank 0 to finish its line: show what waited for it."""
        if self._held:
            self._write(self._out, _CLEAR_LINE)
            self._release()
            self._write(self._out, self._drawn)

    def restore(self) -> None:
        """Leave the terminal as a shell expects it after rank 0 was cut off while drawing."""
        self.settle()
        if self._terminal:
            self._write(self._out, _SHOW_CURSOR + (b"\n" if self._drawn else b""))
            self._drawn = b""

    def _release(self) -> None:
        held, self._held = self._held, []
        for stream, text in held:
            self._write(stream, text)

    def _mark(self, rank: int) -> bytes:
        mark = b"[%d] " % rank
        if self._colour:
            return b"\x1b[%dm%s\x1b[0m" % (_COLOURS[rank % len(_COLOURS)], mark)
        return mark

    @staticmethod
    def _write(stream: BinaryIO, data: bytes) -> None:
        stream.write(data)
        stream.flush()
