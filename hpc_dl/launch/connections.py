"""The launcher's end of the connections to its ranks."""

import os
import selectors
import shutil
import socket
import tempfile
from dataclasses import dataclass, field
from pathlib import Path

from hpc_dl.launch import channel
from hpc_dl.launch.channel import End, Hello
from hpc_dl.launch.screen import LineSplitter, Screen

_CHUNK = 1 << 16
#: The kernel's limit on the path of a Unix socket is 108 bytes.
_LONGEST_PATH = 100


@dataclass
class _Link:
    hello: Hello | None = None
    rest: bytes = b""
    lines: LineSplitter = field(default_factory=LineSplitter)


class Switchboard:
    """Accept the ranks' connections, pass their lines to the screen, keep what they report.

    Args:
        screen: where output goes.
    """

    def __init__(self, screen: Screen) -> None:
        self.ends: dict[int, End] = {}
        self.pids: dict[int, int] = {}
        #: Ranks whose control connection closed without an `End`.
        self.lost: list[int] = []
        self._screen = screen
        self._links: dict[socket.socket, _Link] = {}
        self._folder = tempfile.mkdtemp(prefix="hpc-dl-")
        if len(self._folder) > _LONGEST_PATH - len("/ranks"):
            os.rmdir(self._folder)
            self._folder = tempfile.mkdtemp(prefix="hpc-dl-", dir="/tmp")
        self.path = str(Path(self._folder) / "ranks")
        self._door = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._door.bind(self.path)
        self._door.listen(512)
        self._door.setblocking(False)
        self._selector = selectors.DefaultSelector()
        self._selector.register(self._door, selectors.EVENT_READ)

    @property
    def open(self) -> bool:
        """Tell whether any rank, or a child of one, still holds a connection."""
        return bool(self._links)

    @property
    def present(self) -> list[int]:
        """Return the process ids of the ranks that joined and have not reported their end."""
        return [
            pid
            for rank, pid in self.pids.items()
            if rank not in self.ends and rank not in self.lost
        ]

    def watch(self, descriptor: int) -> None:
        """Also wake up for this file descriptor, which `turn` then returns."""
        self._selector.register(descriptor, selectors.EVENT_READ)

    def unwatch(self, descriptor: int) -> None:
        """Wake up no more for this descriptor."""
        self._selector.unregister(descriptor)

    def turn(self, wait: float) -> list[int]:
        """Serve what is ready, waiting at most ``wait`` seconds for it.

        Returns:
            the watched descriptors that can be read.
        """
        ready = []
        for key, _ in self._selector.select(wait):
            if isinstance(key.fileobj, int):
                ready.append(key.fileobj)
            elif key.fileobj is self._door:
                self._accept()
            elif isinstance(key.fileobj, socket.socket):
                self._read(key.fileobj)
        return ready

    def close(self) -> None:
        """Show the unfinished last lines, close everything and remove the socket."""
        for link in list(self._links):
            self._drop(link)
        self._selector.close()
        self._door.close()
        shutil.rmtree(self._folder, ignore_errors=True)

    def _accept(self) -> None:
        link, _ = self._door.accept()
        link.setblocking(False)
        self._links[link] = _Link()
        self._selector.register(link, selectors.EVENT_READ)

    def _read(self, link: socket.socket) -> None:
        try:
            data = link.recv(_CHUNK)
        except BlockingIOError:
            return
        except ConnectionResetError:
            data = b""
        state = self._links[link]
        if not data:
            self._drop(link)
        elif state.hello is not None:
            self._take(state, state.hello, data)
        else:
            self._greet(link, state, data)

    def _greet(self, link: socket.socket, state: _Link, data: bytes) -> None:
        line, end, rest = (state.rest + data).partition(b"\n")
        if not end:
            state.rest = line
            return
        try:
            state.hello = channel.decode_hello(line)
        except ValueError:
            self._drop(link)  # not one of ours
            return
        state.rest = b""
        if state.hello.stream == "control":
            self.pids[state.hello.rank] = state.hello.pid
        if rest:
            self._take(state, state.hello, rest)

    def _take(self, state: _Link, hello: Hello, data: bytes) -> None:
        if hello.stream != "control":
            self._show(hello, state.lines.feed(data))
            return
        line, end, state.rest = (state.rest + data).partition(b"\n")
        if end:
            self.ends.setdefault(hello.rank, channel.decode_end(line))
        else:
            state.rest = line

    def _show(self, hello: Hello, lines: list[bytes]) -> None:
        for line in lines:
            self._screen.line(line, hello.rank, error=hello.stream == "stderr")

    def _drop(self, link: socket.socket) -> None:
        state = self._links.pop(link)
        self._selector.unregister(link)
        link.close()
        if state.hello is None:
            return
        if state.hello.stream != "control":
            self._show(state.hello, state.lines.close())
        elif state.hello.rank not in self.ends:
            self.lost.append(state.hello.rank)
