"""Whole jobs under plain mpirun: one rank fails or comes late, and none waits for ever."""

import os
import re
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest

from hpc_dl.comm.choose import installed_horovod
from hpc_dl.errors import HpcDlError
from hpc_dl.launch.mpirun import find_mpirun, start_environment, start_options

pytestmark = pytest.mark.timeout(120)

#: Within so many seconds of the failure the job has ended.
PROMISED = 5.0

#: Says when it fails; ``fail`` is called by one rank, ``others`` by the rest.
SCRIPT = """
import sys, threading, time
import numpy as np
import hpc_dl.world as world

world.init_framework({comm!r})
comm = world.current().comm
comm.barrier()

def fail():
{fail}

def others():
{others}

if comm.rank == comm.size - 1:
    print("failing at", time.time(), flush=True)
    fail()
else:
    others()
"""


class Outcome(NamedTuple):
    """What came of a job; ``took`` is the seconds from the failure to the end."""

    code: int
    text: str
    took: float


Run = Callable[..., Outcome]


@pytest.fixture
def run(tmp_path: Path) -> Run:
    """Return a function that runs a script made of two parts on some ranks."""
    try:
        mpirun = find_mpirun()
    except HpcDlError as error:
        pytest.skip(str(error))

    def start(
        fail: str, others: str, ranks: int = 2, comm: str = "mpi", **environment: str
    ) -> Outcome:
        parts = {"fail": fail, "others": others}
        indented = {key: textwrap.indent(text, "    ") for key, text in parts.items()}
        script = tmp_path / "script.py"
        script.write_text(SCRIPT.format(comm=comm, **indented))
        job = subprocess.run(
            [mpirun.path, *start_options(mpirun, ranks, ()), sys.executable, script],
            env=start_environment(mpirun, os.environ | environment),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            timeout=60,
            check=False,
        )
        ended = time.time()
        began = re.search(r"failing at ([\d.]+)", job.stdout)
        assert began, job.stdout
        return Outcome(job.returncode, job.stdout, ended - float(began[1]))

    return start


WAITS = {
    "small all-reduce": "comm.allreduce(np.ones(3))",
    "staged all-reduce": "comm.allreduce(np.ones(1_000_000, np.float32))",
    "works under way": "works = [comm.allreduce_async(np.ones(100_000)) for _ in range(3)]\n"
    "for work in works: work.wait()",
    "receive": "comm.recv(np.ones(3))",
    "no collective": "time.sleep(50)",
}


@pytest.mark.parametrize("waits", WAITS)
def test_rank_that_raises_ends_the_job(run: Run, waits: str) -> None:
    outcome = run("raise ZeroDivisionError('on purpose')", WAITS[waits], ranks=3)
    assert outcome.code != 0
    assert outcome.took < PROMISED
    assert "hpc_dl: rank 2 failed; ending the job" in outcome.text
    assert "raise ZeroDivisionError('on purpose')" in outcome.text, "the line of the script"
    assert "ZeroDivisionError: on purpose" in outcome.text


def test_thread_that_raises_ends_the_job(run: Run) -> None:
    fail = """
        def work():
            raise ZeroDivisionError('in a thread')
        threading.Thread(target=work).start()
        comm.allreduce(np.ones(3)); comm.allreduce(np.ones(3))
    """
    outcome = run(textwrap.dedent(fail), "comm.allreduce(np.ones(3)); time.sleep(50)")
    assert outcome.code != 0
    assert outcome.took < PROMISED
    assert "hpc_dl: rank 1 failed" in outcome.text
    assert "ZeroDivisionError: in a thread" in outcome.text


@pytest.mark.parametrize(("status", "code"), [("3", 3), ("'no data here'", 1)])
def test_exit_with_an_error_code_ends_the_job(run: Run, status: str, code: int) -> None:
    outcome = run(f"sys.exit({status})", WAITS["small all-reduce"])
    assert outcome.code == code
    assert outcome.took < PROMISED
    assert f"hpc_dl: rank 1 left with exit code {code}; ending the job" in outcome.text
    if code == 1:
        assert "no data here" in outcome.text


def test_exit_that_is_caught_or_without_error_is_none(run: Run) -> None:
    fail = """
        try:
            sys.exit(3)
        except SystemExit as leaving:
            print("caught", leaving.code)
        comm.allreduce(np.ones(3))
        sys.exit(0)
    """
    outcome = run(textwrap.dedent(fail), WAITS["small all-reduce"])
    assert outcome.code == 0, outcome.text
    assert "caught 3" in outcome.text
    assert "ending the job" not in outcome.text


def test_error_over_horovod_ends_the_job(run: Run) -> None:
    if not (found := installed_horovod()) or "torch" not in found.frameworks:
        pytest.skip("Horovod is not built for torch")
    outcome = run("raise ZeroDivisionError('on purpose')", "comm.barrier()", comm="horovod")
    assert outcome.code != 0
    assert outcome.took < PROMISED
    assert "hpc_dl: rank 1 failed" in outcome.text
    assert "ZeroDivisionError: on purpose" in outcome.text


@pytest.mark.parametrize("waits", ["small all-reduce", "staged all-reduce"])
def test_stalled_rank_is_named_and_the_job_goes_on(run: Run, waits: str) -> None:
    outcome = run(
        f"time.sleep(2)\n{WAITS[waits]}", WAITS[waits], ranks=3, HPC_DL_STALL_WARN_SECONDS="0.5"
    )
    assert outcome.code == 0, outcome.text
    for rank in (0, 1):
        assert re.search(
            rf"rank {rank} of 3 has waited \d+ s in allreduce\(\d+,\) float\d+ over 'mpi': "
            r"rank\(s\) 2 have not called it\. Usual causes",
            outcome.text,
        )


def test_stall_that_lasts_ends_the_job(run: Run) -> None:
    outcome = run(
        "time.sleep(50)",
        "comm.barrier()",
        HPC_DL_STALL_WARN_SECONDS="0.5",
        HPC_DL_STALL_ABORT_SECONDS="1.5",
    )
    assert outcome.code != 0
    assert 1.5 < outcome.took < 1.5 + PROMISED
    assert re.search(r"rank 0 of 2 has waited .* in barrier.*rank\(s\) 1 have not", outcome.text)
    assert re.search(r"ending the job after \d+ s \(stall abort\)", outcome.text)


def test_nodes_are_told_apart(run: Run) -> None:
    """With one rank on each node nothing is known of the others but that they are late."""
    outcome = run(
        "time.sleep(1.5)\ncomm.barrier()",
        "comm.barrier()",
        comm="mpi:node_size=1",
        HPC_DL_STALL_WARN_SECONDS="0.4",
    )
    assert outcome.code == 0, outcome.text
    assert "other ranks have not called it" in outcome.text


def test_job_ends_though_nothing_was_closed(run: Run) -> None:
    """Each rank is in other groups, with shared memory in each, when the program ends."""
    work = """
        kept = []
        for turn in range(3):
            group = comm.split((comm.rank + turn) % 2)
            kept += [group, group.allocate(1 << 16), comm.allocate(1 << 12)]
            group.allreduce(np.ones(100_000))
            if turn == 1:
                group.close()
        comm.allreduce_async(np.ones(100_000))
    """
    outcome = run(textwrap.dedent(work), textwrap.dedent(work), ranks=3)
    assert outcome.code == 0, outcome.text


@pytest.mark.parametrize("text", ["soon", "-1", "nan"])
def test_bad_number_of_seconds(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from hpc_dl.errors import OptionError
    from hpc_dl.testing import run_threads
    from hpc_dl.world import init_framework

    monkeypatch.setenv("HPC_DL_STALL_WARN_SECONDS", text)
    with pytest.raises(OptionError, match=f"HPC_DL_STALL_WARN_SECONDS='{text}'; give a number"):
        run_threads(1, init_framework)
