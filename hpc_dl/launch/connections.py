"""The launcher's end of the connections to its ranks."""

import contextlib
import fcntl
import os
import selectors
import shutil
import socket
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from hpc_dl.launch import channel
from hpc_dl.launch.channel import End, Hello
from hpc_dl.launch.screen import LineSplitter, Screen

_CHUNK = 1 << 16
#: A rank's stdout and stderr.
_MOST_PIPES = 2
#: The kernel's limit on the path of a Unix socket is 108 bytes.
_LONGEST_PATH = 100


@dataclass
class _Line:
    """The connection to one rank: what it said first, and what is still incomplete."""

    hello: Hello | None = None
    rest: bytes = b""
    pipes: list[int] = field(default_factory=list)


@dataclass(frozen=True)
class _Output:
    """The pipe that a rank's stdout or stderr has become."""

    rank: int
    error: bool
    lines: LineSplitter


class Switchboard:
    """Accept the ranks' connections, pass their lines to the screen, keep what they report.

    Args:
        screen: where output goes. While it is full, the ranks' output has to wait.
    """

    def __init__(self, screen: Screen) -> None:
        self.ends: dict[int, End] = {}
        self.pids: dict[int, int] = {}
        #: Ranks whose connection closed without an `End`.
        self.lost: list[int] = []
        self._screen = screen
        self._lines: dict[socket.socket, _Line] = {}
        self._outputs: dict[int, _Output] = {}
        #: What to do about a descriptor that gives output; not watched while paused.
        self._sources: dict[int, Callable[[], object]] = {}
        self._paused = False
        self._folder = tempfile.mkdtemp(prefix="hpc-dl-")
        if len(self._folder) > _LONGEST_PATH - len("/ranks"):
            os.rmdir(self._folder)
            self._folder = tempfile.mkdtemp(prefix="hpc-dl-", dir="/tmp")
        self.path = str(Path(self._folder) / "ranks")
        self._door = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._door.bind(self.path)
        self._door.listen(512)
        self._door.setblocking(False)
        #: The screen's descriptors that are not ready; unlike epoll, poll also takes files.
        self._unready: set[int] = set()
        self._selector = selectors.PollSelector()
        self._selector.register(self._door, selectors.EVENT_READ, self._accept)

    @property
    def open(self) -> bool:
        """Tell whether any rank, or a child of one, can still be heard."""
        return bool(self._lines or self._outputs)

    @property
    def present(self) -> list[int]:
        """Return the process ids of the ranks that joined and live, also past their script."""
        return [line.hello.pid for line in self._lines.values() if line.hello is not None]

    def watch(self, descriptor: int, act: Callable[[], object], *, output: bool = False) -> None:
        """Also call ``act`` when this descriptor can be read.

        Args:
            descriptor: what to watch.
            act: what to call.
            output: it gives output for the screen, which has to wait while that is full.
        """
        if output:
            self._sources[descriptor] = act
        if not (output and self._paused):
            self._selector.register(descriptor, selectors.EVENT_READ, act)

    def unwatch(self, descriptor: int) -> None:
        """Look no more at this descriptor."""
        output = self._sources.pop(descriptor, None) is not None
        if not (output and self._paused):
            self._selector.unregister(descriptor)

    def turn(self, wait: float) -> None:
        """Serve what is ready, waiting at most ``wait`` seconds for it."""
        self._screen.pump()
        self._await(self._screen.waiting_for)
        if self._screen.full is not self._paused:
            self._pause(self._screen.full)
        for key, _ in self._selector.select(wait):
            key.data()

    def finish(self) -> None:
        """Take what is left, once no process of the job lives that could write more."""
        with contextlib.suppress(BlockingIOError):
            while True:
                self._accept()
        for link in list(self._lines):
            while link in self._lines and self._hear(link):
                pass
        for pipe in list(self._outputs):
            # A process that hid from the launcher may write for ever; what the job itself
            # wrote is not more than a pipe holds.
            left = fcntl.fcntl(pipe, fcntl.F_GETPIPE_SZ)
            while left > 0 and (count := self._read(pipe)):
                left -= count
            if pipe in self._outputs:
                self._drop_output(pipe)

    def close(self) -> None:
        """Close everything and remove the socket."""
        for link, line in self._lines.items():
            link.close()
            _close_all(line.pipes)
        _close_all(list(self._outputs))
        self._selector.close()
        self._door.close()
        shutil.rmtree(self._folder, ignore_errors=True)

    def _await(self, descriptors: set[int]) -> None:
        for ready in self._unready - descriptors:
            self._selector.unregister(ready)
        for unready in descriptors - self._unready:
            self._selector.register(unready, selectors.EVENT_WRITE, self._screen.pump)
        self._unready = descriptors

    def _pause(self, paused: bool) -> None:
        self._paused = paused
        for descriptor, act in self._sources.items():
            if paused:
                self._selector.unregister(descriptor)
            else:
                self._selector.register(descriptor, selectors.EVENT_READ, act)

    def _accept(self) -> None:
        link, _ = self._door.accept()
        link.setblocking(False)
        self._lines[link] = _Line()
        self._selector.register(link, selectors.EVENT_READ, partial(self._hear, link))

    def _hear(self, link: socket.socket) -> bool:
        """Read from a rank's connection; tell whether there was something."""
        line = self._lines[link]
        try:
            flags = socket.MSG_CMSG_CLOEXEC
            data, pipes, _, _ = socket.recv_fds(link, _CHUNK, _MOST_PIPES, flags)
        except BlockingIOError:
            return False
        except ConnectionResetError:
            data, pipes = b"", []
        line.pipes += pipes
        if not data:
            self._drop(link)
            return False
        *messages, line.rest = (line.rest + data).split(b"\n")
        for message in messages:
            if line.hello is not None:
                self.ends.setdefault(line.hello.rank, channel.decode_end(message))
            elif not self._greet(line, message):
                self._drop(link)  # not one of ours
                return False
        return True

    def _greet(self, line: _Line, message: bytes) -> bool:
        try:
            hello = channel.decode_hello(message)
        except ValueError:
            return False
        if len(hello.streams) != len(line.pipes):
            return False
        line.hello = hello
        self.pids[hello.rank] = hello.pid
        for stream, pipe in zip(hello.streams, line.pipes, strict=True):
            os.set_blocking(pipe, False)
            self._outputs[pipe] = _Output(hello.rank, stream == "stderr", LineSplitter())
            self.watch(pipe, partial(self._read, pipe), output=True)
        line.pipes = []
        return True

    def _read(self, pipe: int) -> int:
        """Read from a rank's output; return how many bytes there were."""
        try:
            data = os.read(pipe, _CHUNK)
        except BlockingIOError:
            return 0
        if data:
            self._show(self._outputs[pipe], data)
        else:
            self._drop_output(pipe)
        return len(data)

    def _show(self, output: _Output, data: bytes) -> None:
        for text in output.lines.feed(data) if data else output.lines.close():
            self._screen.line(text, output.rank, error=output.error)

    def _drop_output(self, pipe: int) -> None:
        output = self._outputs.pop(pipe)
        self.unwatch(pipe)
        os.close(pipe)
        self._show(output, b"")

    def _drop(self, link: socket.socket) -> None:
        line = self._lines.pop(link)
        self._selector.unregister(link)
        link.close()
        _close_all(line.pipes)
        if line.hello is not None and line.hello.rank not in self.ends:
            self.lost.append(line.hello.rank)


def _close_all(descriptors: list[int]) -> None:
    for descriptor in descriptors:
        os.close(descriptor)
