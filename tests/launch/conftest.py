"""Start real launches; skip with a reason where no mpirun is installed."""

import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from launches import PATIENCE, Launch, Outcome, Start, command

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


@pytest.fixture
def start(write: Callable[[str], Path]) -> Iterator[Start]:
    """Start a launch on two ranks and do not wait for it."""
    jobs: list[subprocess.Popen[str]] = []

    def start(
        text: str, *, options: tuple[object, ...] = (), before: tuple[str, ...] = ()
    ) -> "subprocess.Popen[str]":
        jobs.append(
            subprocess.Popen(
                [*before, *command("-n", 2, *options, write(text))],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
        )
        return jobs[-1]

    yield start
    for job in jobs:
        with job:  # closes its pipes and collects it
            job.kill()


@pytest.fixture
def temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder for temporary files of the launches in a test, and of nobody else."""
    folder = tmp_path / "temporary"
    folder.mkdir()
    monkeypatch.setenv("TMPDIR", str(folder))
    # Open MPI keeps its session there, and may be killed before it clears up.
    monkeypatch.setenv("PRTE_MCA_prte_tmpdir_base", str(tmp_path))
    monkeypatch.setenv("OMPI_MCA_orte_tmpdir_base", str(tmp_path))
    return folder
