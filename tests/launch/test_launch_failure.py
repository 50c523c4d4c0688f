"""A rank that fails ends the job at once, is heard, and gives the exit code."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from launches import PATIENCE, Launch, alive, command, wait_until

#: Seconds within which a failing rank must have ended the whole job.
PROMPT = 5.0

WAIT_FOR_EVER = "time.sleep(1000)"


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


def test_a_time_limit_shows_where_each_rank_stood(launch: Launch) -> None:
    done = launch(f"def stuck(): {WAIT_FOR_EVER}\nstuck()", options=("--timeout", 6))
    assert done.code == 124
    assert done.err.count("in stuck") == 2
    assert "still running after 6 s" in done.err


def test_a_world_of_another_size_is_an_error(tmp_path: Path, write: Callable[[str], Path]) -> None:
    """What srun --mpi=none does: as many processes as asked for, each alone in its world."""
    starter = tmp_path / "mpirun"
    starter.write_text(
        "#!/bin/sh\n"
        '[ "$1" = --version ] && { echo "HYDRA build details:"; exit; }\n'
        "shift 2\n"
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


Start = Callable[[str], "subprocess.Popen[str]"]


@pytest.fixture
def start(write: Callable[[str], Path]) -> Iterator[Start]:
    """Start a launch on two ranks and do not wait for it."""
    jobs: list[subprocess.Popen[str]] = []

    def start(text: str) -> "subprocess.Popen[str]":
        jobs.append(
            subprocess.Popen(
                command("-n", 2, write(text)),
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


def pids_of(job: "subprocess.Popen[str]", ranks: int = 2) -> list[int]:
    assert job.stdout is not None
    return [int(job.stdout.readline().split()[-1]) for _ in range(ranks)]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_to_the_launcher_ends_every_rank(start: Start, number: signal.Signals) -> None:
    job = start(f"print(os.getpid(), flush=True); {WAIT_FOR_EVER}")
    pids = pids_of(job)
    job.send_signal(number)
    _, err = job.communicate(timeout=PATIENCE)
    assert job.returncode == 128 + number
    assert number.name in err
    assert "Traceback" not in err
    assert not any(map(alive, pids))


def test_ranks_may_finish_in_good_order_on_sigterm(start: Start) -> None:
    job = start(
        "import signal\n"
        "stop = []\n"
        "signal.signal(signal.SIGTERM, lambda *_: stop.append(1))\n"
        "print(os.getpid(), flush=True)\n"
        "while not stop: time.sleep(0.05)\n"
        "time.sleep(0.5); print('saved', flush=True)",
    )
    pids_of(job)
    job.send_signal(signal.SIGTERM)
    out, err = job.communicate(timeout=PATIENCE)
    assert job.returncode == 0, err
    assert out.count("saved") == 2


def test_other_signals_are_passed_on(start: Start) -> None:
    job = start(
        "import signal\n"
        "seen = []\n"
        "signal.signal(signal.SIGUSR1, lambda *_: seen.append(1))\n"
        "print(os.getpid(), flush=True)\n"
        "while not seen: time.sleep(0.05)",
    )
    pids_of(job)
    job.send_signal(signal.SIGUSR1)
    job.communicate(timeout=PATIENCE)
    assert job.returncode == 0


def test_nothing_is_left_when_the_launcher_is_killed(start: Start) -> None:
    job = start(f"print(os.getpid(), flush=True); {WAIT_FOR_EVER}")
    pids = pids_of(job)
    assert all(map(alive, pids))
    job.kill()
    job.communicate(timeout=PATIENCE)
    assert wait_until(lambda: not any(map(alive, pids)), 10.0)


def test_children_of_ranks_do_not_outlive_the_job(launch: Launch) -> None:
    done = launch(
        "import subprocess\n"
        "child = subprocess.Popen(['sleep', '1000'], start_new_session=True)\n"
        "print(child.pid, flush=True)\n"
        "there = os.path.join(os.path.dirname(__file__), 'there')\n"
        "if RANK == 0: open(there, 'w').close()\n"
        "while not os.path.exists(there): time.sleep(0.05)\n"
        "if RANK == 1: time.sleep(0.3); raise SystemExit(4)\n"
        f"{WAIT_FOR_EVER}"
    )
    assert done.code == 4
    children = [int(line.split()[-1]) for line in done.out.splitlines()]
    assert len(children) == 2
    assert not any(map(alive, children))


def test_a_reader_that_goes_away_ends_the_job(start: Start) -> None:
    job = start("for i in range(10**9): print('line', i)")
    assert job.stdout is not None
    job.stdout.readline()
    job.stdout.close()
    start_of_end = time.monotonic()
    assert job.stderr is not None
    err = job.stderr.read()
    assert job.wait(timeout=PATIENCE) != 0
    assert time.monotonic() - start_of_end < PROMPT
    assert "Traceback" not in err


def test_launches_can_be_nested(launch: Launch, tmp_path: Path) -> None:
    inner = tmp_path / "inner.py"
    inner.write_text("from mpi4py import MPI; print('inner', MPI.COMM_WORLD.size)")
    line = command("-n", 2, inner)
    done = launch(
        "if RANK == 0:\n"
        "    import subprocess\n"
        f"    subprocess.run({line!r}, check=True, timeout=50, stdin=subprocess.DEVNULL)"
    )
    assert done.code == 0, done.err
    assert done.out.count("inner 2") == 2, os.linesep.join((done.out, done.err))
