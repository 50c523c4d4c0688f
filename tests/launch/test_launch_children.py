"""Processes that ranks start: they end with the job, and do not speak for their rank."""

import os
from pathlib import Path

from launches import PATIENCE, WAIT_FOR_EVER, Launch, Start, alive, command, pids_of
from waiting import wait_until


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


def test_launches_can_be_nested(launch: Launch, tmp_path: Path) -> None:
    inner = tmp_path / "inner.py"
    inner.write_text(
        "import os\n"
        "from mpi4py import MPI\n"
        "print('inner', MPI.COMM_WORLD.size, 'merged', os.environ.get('HPC_DL_LAUNCH_MERGED'))"
    )
    line = command("-n", 2, inner)
    done = launch(
        "if RANK == 0:\n"
        "    import subprocess\n"
        # As if the outer launch had its output in one file: that is not so for the inner one.
        "    os.environ['HPC_DL_LAUNCH_MERGED'] = '1'\n"
        f"    subprocess.run({line!r}, check=True, timeout=50, stdin=subprocess.DEVNULL)"
    )
    assert done.code == 0, done.err
    assert done.out.count("inner 2 merged None") == 2, os.linesep.join((done.out, done.err))


def test_a_forked_child_that_leaves_does_not_speak_for_its_rank(launch: Launch) -> None:
    done = launch(
        "if RANK == 1:\n"
        "    child = os.fork()\n"
        "    if child == 0: sys.exit(0)\n"
        "    os.waitpid(child, 0)\n"
        "    raise ValueError('boom')\n"
        f"{WAIT_FOR_EVER}"
    )
    assert done.code == 1
    assert "[1] ValueError: boom" in done.err


def test_a_forked_child_that_raises_does_not_end_the_job(launch: Launch) -> None:
    done = launch(
        "from mpi4py import MPI\n"
        "child = os.fork()\n"
        "if child == 0: raise ValueError('of the child')\n"
        "status = os.waitpid(child, 0)[1]\n"
        "MPI.COMM_WORLD.barrier()\n"
        "print('status', os.waitstatus_to_exitcode(status))"
    )
    assert done.code == 0, done.err
    assert sorted(done.out.splitlines()) == ["[0] status 1", "[1] status 1"]
    assert done.err.count("ValueError: of the child") == 2


def test_a_forked_child_that_runs_off_the_end_is_no_rank(launch: Launch) -> None:
    done = launch(
        "child = os.fork()\n"
        "if child: os.waitpid(child, 0)\n"
        "if child and RANK == 1: time.sleep(0.5); sys.exit(3)"
    )
    assert done.code == 3, done.err


def test_a_rank_is_missed_even_if_its_child_lives_on(launch: Launch) -> None:
    done = launch(
        "if RANK == 1:\n"
        "    if os.fork() == 0: time.sleep(1000)\n"
        "    failing(); os._exit(0)\n"
        f"{WAIT_FOR_EVER}"
    )
    assert done.code == 1
    assert "rank 1 left without finishing the script" in done.err
