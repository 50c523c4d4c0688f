"""Messages between the ranks of one process, matched by source and tag as MPI matches them.

A message goes to the receive that was started first of those that fit; a receive takes the
message that came first of those that fit.
"""

import threading
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from hpc_dl.comm.protocol import ANY, Status
from hpc_dl.errors import HpcDlError, OptionError

Bytes = NDArray[np.uint8]


class PeerFailedError(HpcDlError):
    """Another thread of the group raised, so what this one waits for will never come."""


def too_long(room: int, source: int, tag: int) -> OptionError:
    """Describe a message that is longer than the memory it was to be received in."""
    return OptionError(
        f"recv has room for {room} bytes, and the message from rank {source} with tag {tag} is "
        "longer; it is lost. Ask iprobe() for the size before recv()"
    )


class _Message(NamedTuple):
    source: int
    tag: int
    payload: bytes

    def matches(self, source: int, tag: int) -> bool:
        return source in (ANY, self.source) and tag in (ANY, self.tag)

    def status(self) -> Status:
        return Status(self.source, self.tag, len(self.payload))


class Receive:
    """A receive under way."""

    def __init__(self, mailbox: "Mailbox", room: Bytes, source: int, tag: int):
        self.source, self.tag = source, tag
        self._mailbox, self._room = mailbox, room
        self._message: _Message | None = None

    def deliver(self, message: _Message) -> None:
        """Write a message to where it was wanted."""
        self._message = message
        size = len(message.payload)
        if size <= len(self._room):
            self._room[:size] = np.frombuffer(message.payload, np.uint8)

    def done(self) -> bool:
        """Tell whether ``wait`` would return at once."""
        return self._message is not None

    def wait(self) -> Status:
        """Block until the message is there."""
        self._mailbox.wait_for(self)
        assert self._message is not None
        status = self._message.status()
        if status.nbytes > len(self._room):
            raise too_long(len(self._room), status.source, status.tag)
        return status


class Mailbox:
    """The messages that wait for one rank, and its receives that wait for messages."""

    def __init__(self) -> None:
        self._change = threading.Condition()
        self._messages: list[_Message] = []
        self._receives: list[Receive] = []
        self._aborted = False

    def put(self, source: int, tag: int, payload: bytes) -> None:
        """Leave a message."""
        message = _Message(source, tag, payload)
        with self._change:
            for receive in self._receives:
                if message.matches(receive.source, receive.tag):
                    self._receives.remove(receive)
                    receive.deliver(message)
                    break
            else:
                self._messages.append(message)
            self._change.notify_all()

    def peek(self, source: int, tag: int) -> Status | None:
        """Describe the first message that matches, if there is one."""
        with self._change:
            found = self._find(source, tag)
            return found.status() if found else None

    def take(self, room: Bytes, source: int, tag: int) -> Receive:
        """Start to receive a message that matches into the front of ``room``."""
        receive = Receive(self, room, source, tag)
        with self._change:
            found = self._find(source, tag)
            if found is None:
                self._receives.append(receive)
            else:
                self._messages.remove(found)
                receive.deliver(found)
        return receive

    def wait_for(self, receive: Receive) -> None:
        """Block until ``receive`` has its message."""
        with self._change:
            self._change.wait_for(lambda: self._aborted or receive.done())
        if not receive.done():
            raise PeerFailedError("recv: another rank of this group failed; no message will come")

    def abort(self) -> None:
        """Wake a rank that waits for a message that will never come."""
        with self._change:
            self._aborted = True
            self._change.notify_all()

    def _find(self, source: int, tag: int) -> _Message | None:
        return next((m for m in self._messages if m.matches(source, tag)), None)
