"""Start real launches; skip with a reason where no mpirun is installed."""

import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from launches import PATIENCE, Launch, Outcome, command

from hpc_dl.errors import HpcDlError
from hpc_dl.launch.mpirun import find_mpirun


@pytest.fixture(scope="session", autouse=True)
def _mpirun() -> None:
    try:
        find_mpirun()
    except HpcDlError as error:
        pytest.skip(f"no mpirun to launch with: {error}")


#: What every script begins with.
PREAMBLE = """\
import os, sys, time
RANK = int(os.environ["OMPI_COMM_WORLD_RANK"])
def failing(): print("failing at", time.time(), flush=True)
"""


@pytest.fixture
def write(tmp_path: Path) -> Callable[[str], Path]:
    """Write a script into a folder whose name has a space."""

    def write(text: str, name: str = "a script.py") -> Path:
        path = tmp_path / "my jobs" / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(PREAMBLE + text)
        return path

    return write


@pytest.fixture
def launch(write: Callable[[str], Path]) -> Launch:
    """Run a script's text on some ranks and wait for its end."""

    def launch(
        text: str, *arguments: object, ranks: int = 2, options: tuple[object, ...] = ()
    ) -> Outcome:
        done = subprocess.run(
            command("-n", ranks, *options, write(text), *arguments),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=PATIENCE,
            check=False,
        )
        return Outcome(done.returncode, done.stdout, done.stderr, time.time())

    return launch
