"""Messages between the ranks of one process, matched by source and tag as MPI matches them."""

import threading
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from hpc_dl.comm.protocol import ANY, Status
from hpc_dl.errors import HpcDlError, OptionError

Bytes = NDArray[np.uint8]


class _Message(NamedTuple):
    source: int
    tag: int
    payload: bytes

    def matches(self, source: int, tag: int) -> bool:
        return source in (ANY, self.source) and tag in (ANY, self.tag)

    def status(self) -> Status:
        return Status(self.source, self.tag, len(self.payload))


class Mailbox:
    """The messages that wait for one rank, in the order of their arrival."""

    def __init__(self) -> None:
        self._arrival = threading.Condition()
        self._messages: list[_Message] = []
        self._aborted = False

    def put(self, source: int, tag: int, payload: bytes) -> None:
        """Leave a message."""
        with self._arrival:
            self._messages.append(_Message(source, tag, payload))
            self._arrival.notify_all()

    def peek(self, source: int, tag: int) -> Status | None:
        """Describe the first message that matches, if there is one."""
        with self._arrival:
            found = self._find(source, tag)
            return found.status() if found else None

    def take(self, room: Bytes, source: int, tag: int) -> Status:
        """Wait for a message that matches, move it to the front of ``room``."""
        with self._arrival:
            self._arrival.wait_for(lambda: self._aborted or self._find(source, tag) is not None)
            found = self._find(source, tag)
            if found is None:
                raise HpcDlError("recv: another rank of this group failed; no message will come")
            return self._move(found, room)

    def take_later(self, room: Bytes, source: int, tag: int) -> "PendingReceive":
        """Promise to take a message that matches."""
        return PendingReceive(self, room, source, tag)

    def abort(self) -> None:
        """Wake a rank that waits for a message that will never come."""
        with self._arrival:
            self._aborted = True
            self._arrival.notify_all()

    def _find(self, source: int, tag: int) -> _Message | None:
        return next((m for m in self._messages if m.matches(source, tag)), None)

    def _move(self, message: _Message, room: Bytes) -> Status:
        size = len(message.payload)
        if size > len(room):
            raise OptionError(
                f"recv has room for {len(room)} bytes; rank {message.source} sent {size} "
                f"(tag {message.tag}). Ask iprobe() for the size first"
            )
        self._messages.remove(message)
        room[:size] = np.frombuffer(message.payload, np.uint8)
        return message.status()


class PendingReceive:
    """A receive under way."""

    def __init__(self, mailbox: Mailbox, room: Bytes, source: int, tag: int):
        self._mailbox, self._room, self._source, self._tag = mailbox, room, source, tag
        self._status: Status | None = None

    def done(self) -> bool:
        """Tell whether ``wait`` would return at once."""
        return self._status is not None or self._mailbox.peek(self._source, self._tag) is not None

    def wait(self) -> Status:
        """Block until the message is there."""
        if self._status is None:
            self._status = self._mailbox.take(self._room, self._source, self._tag)
        return self._status
