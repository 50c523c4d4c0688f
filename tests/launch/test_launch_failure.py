"""A rank that fails ends the job at once, is heard, and gives the exit code."""

import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from launches import PATIENCE, PROMPT, WAIT_FOR_EVER, Launch, command


@pytest.mark.parametrize("ranks", [1, 2, 3])
@pytest.mark.parametrize("mpi", [False, True], ids=["no MPI", "MPI"])
def test_a_rank_that_raises_ends_the_job(launch: Launch, ranks: int, mpi: bool) -> None:
    failing = ranks - 1
    done = launch(
        f"""
{"from mpi4py import MPI" if mpi else ""}
def inner():
    raise ValueError("boom")
print("started", flush=True)
if RANK == {failing}:
    failing()
    inner()
{"MPI.COMM_WORLD.barrier()" if mpi else WAIT_FOR_EVER}
""",
        ranks=ranks,
    )
    assert done.code == 1
    assert done.took_to_end < PROMPT
    mark = f"[{failing}] " if ranks > 1 else ""
    assert done.err.count("Traceback (most recent call last)") == 1
    assert f"{mark}ValueError: boom\n" in done.err
    assert f"rank {failing} failed with exit code 1: ValueError: boom" in done.err
    traceback = done.err.partition("ValueError: boom")[0]
    assert "in inner" in traceback
    assert "runpy" not in traceback
    assert "worker.py" not in traceback
    # mpirun's own report of the end adds nothing.
    assert "mpirun" not in done.err
    assert "prterun" not in done.err
    assert "started" in done.out


def test_ranks_that_fail_alike_show_one_traceback(launch: Launch) -> None:
    done = launch("import no_such_module_at_all", ranks=3)
    assert done.code == 1
    assert done.err.count("Traceback (most recent call last)") == 1
    assert "ModuleNotFoundError" in done.err


@pytest.mark.parametrize("status", [3, 77, 255])
@pytest.mark.parametrize("leave", ["sys.exit", "os._exit"])
def test_the_exit_code_is_the_failing_ranks(launch: Launch, status: int, leave: str) -> None:
    done = launch(f"if RANK == 1: failing(); {leave}({status})\n{WAIT_FOR_EVER}")
    assert done.code == status, done.err
    assert done.took_to_end < PROMPT
    assert "Traceback" not in done.err


def test_sys_exit_with_a_message_shows_it_once(launch: Launch) -> None:
    done = launch(f"if RANK == 1: sys.exit('no data in /scratch')\n{WAIT_FOR_EVER}")
    assert done.code == 1
    assert done.err.count("no data in /scratch") == 1


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSEGV, signal.SIGTERM])
def test_a_rank_that_a_signal_ends_gives_128_plus_it(launch: Launch, number: int) -> None:
    done = launch(f"if RANK == 1: failing(); os.kill(os.getpid(), {int(number)})\n{WAIT_FOR_EVER}")
    assert done.code == 128 + number, done.err
    assert done.took_to_end < PROMPT
    assert f"rank 1 was ended by signal {int(number)}" in done.err


def test_a_crash_in_c_shows_where_python_was(launch: Launch) -> None:
    done = launch(
        f"import ctypes\ndef crash(): ctypes.string_at(8)\nif RANK == 0: crash()\n{WAIT_FOR_EVER}"
    )
    assert done.code == 128 + signal.SIGSEGV
    assert "[0] Fatal Python error: Segmentation fault" in done.err
    assert "in crash" in done.err


def test_a_rank_that_leaves_early_and_silently_is_a_failure(launch: Launch) -> None:
    done = launch("if RANK == 1: os._exit(0)\ntime.sleep(1)")
    assert done.code == 1
    assert "rank 1 left without finishing the script" in done.err


def test_a_rank_that_ignores_sigterm_is_ended_all_the_same(launch: Launch) -> None:
    done = launch(
        "import signal\n"
        "signal.signal(signal.SIGTERM, signal.SIG_IGN)\n"
        "if RANK == 1: failing(); raise RuntimeError('done for')\n"
        f"{WAIT_FOR_EVER}"
    )
    assert done.code == 1
    assert done.took_to_end < PROMPT


@pytest.mark.parametrize(
    "before", ["", "os.dup2(os.open(os.devnull, os.O_WRONLY), 2)"], ids=["", "errors turned away"]
)
def test_a_time_limit_shows_where_each_rank_stood(before: str, launch: Launch) -> None:
    done = launch(f"{before}\ndef stuck(): {WAIT_FOR_EVER}\nstuck()", options=("--timeout", 6))
    assert done.code == 124
    assert done.err.count("in stuck") == 2
    assert "still running after 6 s" in done.err


def test_an_error_that_ends_mpi_is_shown(launch: Launch) -> None:
    done = launch(
        "from mpi4py import MPI\n"
        "MPI.COMM_WORLD.Set_errhandler(MPI.ERRORS_ARE_FATAL)\n"
        "if RANK == 0: failing(); MPI.COMM_WORLD.Send(bytearray(8), dest=99)\n"
        f"{WAIT_FOR_EVER}"
    )
    assert done.code not in (0, 1), done.err
    assert done.took_to_end < PROMPT
    assert "MPI_ERR_RANK: invalid rank" in done.err
    assert "rank 0 ended the job" in done.err
    assert "prterun" not in done.err


def test_a_save_that_fails_at_the_time_limit_is_shown(launch: Launch) -> None:
    done = launch(
        "import signal\n"
        "def save(*_): raise OSError('disk full while saving')\n"
        "if RANK == 1: signal.signal(signal.SIGTERM, save)\n"
        f"{WAIT_FOR_EVER}",
        options=("--timeout", 4),
    )
    assert done.code == 124
    assert "[1] OSError: disk full while saving" in done.err
    assert "in save" in done.err


def test_sigkill_while_the_others_wait_in_a_collective(launch: Launch) -> None:
    done = launch(
        "import signal\n"
        "from mpi4py import MPI\n"
        "MPI.COMM_WORLD.barrier()\n"
        "if RANK == 1: failing(); os.kill(os.getpid(), signal.SIGKILL)\n"
        "MPI.COMM_WORLD.barrier()",
        ranks=3,
    )
    assert done.code == 128 + signal.SIGKILL, done.err
    assert done.took_to_end < 20
    assert "rank 1 was ended by signal 9" in done.err


def test_mpi_in_another_world_is_an_error_also_after_sys_exit(launch: Launch) -> None:
    """MPI with no word from mpirun: each rank is alone, as under the mpirun of another MPI."""
    done = launch(
        "for name in list(os.environ):\n"
        "    if name.startswith(('PMIX_', 'OMPI_COMM', 'PRTE')): del os.environ[name]\n"
        "from mpi4py import MPI\n"
        "assert MPI.COMM_WORLD.size == 1\n"
        "sys.exit(0)"
    )
    assert done.code == 1, done.err
    assert "2 ranks were started, but this one sees a world of 1" in done.err


def test_a_rank_on_another_machine_says_so(write: Callable[[str], Path], tmp_path: Path) -> None:
    """A socket that is not there is what a rank of another node sees."""
    done = subprocess.run(
        [sys.executable, "-m", "hpc_dl.launch.worker", str(write("print('never')"))],
        env={**os.environ, "HPC_DL_LAUNCH_SOCKET": str(tmp_path / "ranks")},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=PATIENCE,
        check=False,
    )
    assert done.returncode == 1
    assert "serves one machine" in done.stderr
    assert "never" not in done.stdout


def test_a_job_stays_on_this_machine_in_an_allocation_of_two(
    write: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    nodes = f"{socket.gethostname()},another"
    for name, value in {
        "SLURM_JOBID": "7",
        "SLURM_JOB_ID": "7",
        "SLURM_NODELIST": nodes,
        "SLURM_JOB_NODELIST": nodes,
        "SLURM_TASKS_PER_NODE": "1(x2)",
        "SLURM_NNODES": "2",
        "SLURM_JOB_NUM_NODES": "2",
        "SLURM_CPUS_ON_NODE": "1",
    }.items():
        monkeypatch.setenv(name, value)
    done = subprocess.run(
        command("-n", 2, "--timeout", 30, write("print(os.uname().nodename)")),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=PATIENCE,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    here = os.uname().nodename
    assert sorted(done.stdout.splitlines()) == [f"[0] {here}", f"[1] {here}"]


def test_a_job_of_this_package_says_what_is_wrong_once(launch: Launch) -> None:
    done = launch(
        "import click\n"
        "from hpc_dl.cli.job import JobCommand\n"
        "from hpc_dl.errors import OptionError\n"
        "@click.command(cls=JobCommand)\n"
        "def main(): raise OptionError('unknown communicator nope')\n"
        "main()"
    )
    assert done.code == 2
    assert done.err.count("unknown communicator nope") == 1
    assert "os._exit" not in done.err


def test_options_of_the_users_replace_those_of_the_launcher(launch: Launch) -> None:
    bind = ("--mpirun-arg=--bind-to", "--mpirun-arg=core")
    # A machine of one core cannot bind two ranks to cores of their own.
    overload = ("--mpirun-arg=--map-by", "--mpirun-arg=slot:oversubscribe")
    done = launch("print('hello')", ranks=1, options=(*bind, *overload))
    assert done.code == 0, done.err
    assert done.out == "hello\n"


def test_a_world_of_another_size_is_an_error(tmp_path: Path, write: Callable[[str], Path]) -> None:
    """What srun --mpi=none does: as many processes as asked for, each alone in its world."""
    starter = tmp_path / "mpirun"
    starter.write_text(
        "#!/bin/sh\n"
        '[ "$1" = --version ] && { echo "HYDRA build details:"; exit; }\n'
        "shift 4\n"
        'PMI_RANK=0 OMPI_COMM_WORLD_RANK=0 "$@" & PMI_RANK=1 OMPI_COMM_WORLD_RANK=1 "$@"\n'
        "code=$?; wait; exit $code\n"
    )
    starter.chmod(0o755)
    done = subprocess.run(
        command("-n", 2, "--mpirun", starter, write("print('never')")),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=PATIENCE,
        check=False,
    )
    assert done.returncode == 1
    assert "2 ranks were started, but this one sees a world of 1" in done.stderr
    assert "hpc-dl doctor" in done.stderr
    assert "never" not in done.stdout


def test_without_mpirun_one_rank_runs_and_two_are_an_error(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text("print('alone')")
    # -m with sys.executable patched: an environment that holds no mpirun.
    hide = (
        "import sys; import hpc_dl.launch.mpirun as m; m._candidates = lambda *_: iter(());"
        "from hpc_dl.cli import main; main(prog_name='hpc-dl')"
    )
    done = {
        ranks: subprocess.run(
            [sys.executable, "-c", hide, "launch", "-n", str(ranks), str(script)],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=PATIENCE,
            check=False,
        )
        for ranks in (1, 2)
    }
    assert done[1].returncode == 0, done[1].stderr
    assert done[1].stdout == "alone\n"
    assert "without MPI" in done[1].stderr
    assert done[2].returncode == 1
    assert "hpc_dl[mpi]" in done[2].stderr
    assert "Traceback" not in done[2].stderr


def test_a_named_mpirun_that_is_missing_is_an_error_also_for_one_rank(
    write: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HPC_DL_MPIRUN", "/nope/mpirun")
    done = subprocess.run(
        command("-n", 1, write("print('never')")),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=PATIENCE,
        check=False,
    )
    assert done.returncode == 1
    assert "$HPC_DL_MPIRUN names '/nope/mpirun'" in done.stderr
    assert done.stdout == ""
