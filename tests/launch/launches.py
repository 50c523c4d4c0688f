"""Start launches as a user does, and look at what is left of them."""

import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

#: Seconds for any one launch of these tests, far above what it takes.
PATIENCE = 60.0

#: Seconds within which a failing rank must have ended the whole job.
PROMPT = 5.0

WAIT_FOR_EVER = "time.sleep(1000)"


@dataclass(frozen=True)
class Outcome:
    """What came of a launch; ``ended`` is the time of day in seconds."""

    code: int
    out: str
    err: str
    ended: float

    @property
    def took_to_end(self) -> float:
        """Return the seconds from the script's call of ``failing()`` to the end of the launch."""
        said = next(line for line in self.out.splitlines() if "failing at" in line)
        return self.ended - float(said.split()[-1])


Launch = Callable[..., Outcome]
Start = Callable[..., "subprocess.Popen[str]"]


def command(*arguments: object) -> list[str]:
    return [sys.executable, "-m", "hpc_dl.cli", "launch", *map(str, arguments)]


def pids_of(job: "subprocess.Popen[str]", ranks: int = 2) -> list[int]:
    """Read the process ids that the ranks print first."""
    assert job.stdout is not None
    return [int(job.stdout.readline().split()[-1]) for _ in range(ranks)]


def alive(pid: int) -> bool:
    """Tell whether a process runs (one that has ended and waits to be collected does not)."""
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return False
    return state not in "ZX"
