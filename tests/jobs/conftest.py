"""Run the jobs as a user does."""

import subprocess
import sys
from pathlib import Path

import pytest
from job_runs import PATIENCE, ROOT, Finished, RunJob

from hpc_dl.errors import HpcDlError
from hpc_dl.launch.mpirun import find_mpirun


@pytest.fixture(scope="session")
def run_job(tmp_path_factory: pytest.TempPathFactory) -> RunJob:
    """Run a job on some ranks (0: as plain ``python``) in an empty folder with a space."""

    def run_job(job: str, *options: object, ranks: int = 2, folder: Path | None = None) -> Finished:
        here = tmp_path_factory.mktemp("a run")
        command: list[object] = [sys.executable]
        if ranks:
            command += ["-m", "hpc_dl.cli", "launch", "-n", ranks, "--timeout", PATIENCE]
        folder = here / "results" if folder is None else folder
        command += [ROOT / "jobs" / f"{job}.py", *options, "--run-dir", folder]
        done = subprocess.run(
            [str(part) for part in command],
            cwd=here,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=PATIENCE + 30,
            check=False,
        )
        return Finished(done.returncode, done.stdout, done.stderr, folder)

    return run_job


@pytest.fixture(scope="session", autouse=True)
def _mpirun() -> None:
    try:
        find_mpirun()
    except HpcDlError as error:
        pytest.skip(f"no mpirun to run jobs with: {error}")
