"""What mpirun says besides the ranks: leave out what it says after every failure."""

import re

_RULER = re.compile(r"^\s*[-=]{20,}\s*$")
#: How the paragraphs begin in which Open MPI and Hydra report that a rank ended badly. The
#: launcher says the same in one line.
_KNOWN = re.compile(
    r"(prterun|mpirun|mpiexec|orterun)\s+(detected\s+that|noticed\s+that|has\s+exited\s+due\s+to)"
    r"|MPI_ABORT was invoked"
    r"|Primary job\s+terminated normally"
    r"|=+\s*BAD TERMINATION OF ONE OF YOUR APPLICATION PROCESSES"
)
#: Single lines of the same kind: of daemons that lose each other while a job is being ended.
_CHATTER = re.compile(
    r"\[[^\]]*\] PMIX ERROR: |\[warn\] Epoll "
    r"|YOUR APPLICATION TERMINATED WITH THE EXIT (STRING|CODE)"
    r"|This typically refers to a problem with your application"
    r"|Please see the FAQ page for debugging suggestions"
)


def telling(noise: str) -> str:
    """Return the part of mpirun's output that explains something.

    >>> telling("-" * 74 + "\\nprterun has exited due to process rank 0\\n" + "-" * 74)
    ''
    """
    kept = []
    for part in _parts(noise):
        if not _KNOWN.match("\n".join(part).lstrip()):
            kept += [line for line in part if not _CHATTER.search(line)]
    return "\n".join(kept).strip("\n")


def _parts(noise: str) -> list[list[str]]:
    """Cut the text at its rulers, which go."""
    parts: list[list[str]] = [[]]
    for line in noise.splitlines():
        if _RULER.match(line):
            parts.append([])
        else:
            parts[-1].append(line)
    return parts
