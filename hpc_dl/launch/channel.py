"""What a rank and its launcher tell each other, over a Unix socket in a private folder.

A rank opens one connection. It begins with a `Hello`, which brings the reading ends of the pipes
that the rank's stdout and stderr have become; later it carries at most one `End`; and it stays
open for as long as the rank lives. MPI's own chatter stays on mpirun's streams and so never mixes
with what ranks print.
"""

import json
from dataclasses import asdict, dataclass
from typing import Literal, get_args

Stream = Literal["stdout", "stderr"]

#: Where a rank finds its launcher; also the mark by which stray processes are found.
SOCKET = "HPC_DL_LAUNCH_SOCKET"
#: How many ranks the user asked for; a world of another size is an error.
EXPECTED_SIZE = "HPC_DL_EXPECTED_SIZE"
#: The terminal that rank 0 writes to, when the user sits at one.
TERMINAL = "HPC_DL_LAUNCH_TERMINAL"
#: Set when stdout and stderr end in the same file, so that their order can be kept.
MERGED = "HPC_DL_LAUNCH_MERGED"

#: A traceback longer than this keeps its last part, where the error is.
TRACEBACK_LIMIT = 64_000


@dataclass(frozen=True)
class Hello:
    """How a connection begins: which rank speaks, from which pid, and what its pipes carry."""

    rank: int
    pid: int
    streams: tuple[Stream, ...] = ()


@dataclass(frozen=True)
class End:
    """How a rank ended: its exit code, one line on why, and the traceback if there is one."""

    code: int
    summary: str = ""
    traceback: str = ""


class Failure(SystemExit):
    """The end of a script for a reason that one message tells, without a traceback.

    Args:
        message: what went wrong. The launcher shows it once, however many ranks say it.
        status: the exit code.
    """

    def __init__(self, message: str, status: int) -> None:
        # Python itself prints the code of a SystemExit when it is no number.
        super().__init__(message)
        self.status = status


def encode(message: Hello | End) -> bytes:
    """Return the message as one line of JSON."""
    return json.dumps(asdict(message)).encode() + b"\n"


def decode_hello(line: bytes) -> Hello:
    """Read a `Hello`.

    Raises:
        ValueError: the line is something else.
    """
    try:
        fields = json.loads(line)
        hello = Hello(int(fields["rank"]), int(fields["pid"]), tuple(fields["streams"]))
    except (ValueError, KeyError, TypeError):
        hello = None
    if hello is None or not set(hello.streams) <= set(get_args(Stream)):
        raise ValueError(f"not the greeting of a rank: {line[:80]!r}")
    return hello


def decode_end(line: bytes) -> End:
    """Read an `End`.

    Raises:
        ValueError: the line is something else.
    """
    try:
        fields = json.loads(line)
        return End(int(fields["code"]), str(fields["summary"]), str(fields["traceback"]))
    except (ValueError, KeyError, TypeError):
        raise ValueError(f"not the end of a rank: {line[:80]!r}") from None
