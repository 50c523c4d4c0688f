"""Signals to the launcher reach the ranks, end the job when they should, and leave nothing."""

import signal
import time
from pathlib import Path

import pytest
from launches import (
    PATIENCE,
    WAIT_FOR_EVER,
    Launch,
    Start,
    alive,
    pids_of,
)
from waiting import wait_until


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


def test_what_fails_on_sigterm_is_told(start: Start) -> None:
    job = start(
        "import signal\n"
        "def save(*_): raise OSError('disk full while saving')\n"
        "if RANK == 1: signal.signal(signal.SIGTERM, save)\n"
        f"print(os.getpid(), flush=True); {WAIT_FOR_EVER}"
    )
    pids_of(job)
    job.send_signal(signal.SIGTERM)
    _, err = job.communicate(timeout=PATIENCE)
    assert job.returncode == 128 + signal.SIGTERM
    assert "[1] OSError: disk full while saving" in err
    assert "ended by SIGTERM" in err


def test_a_second_signal_kills(start: Start) -> None:
    job = start(
        "import signal\n"
        "signal.signal(signal.SIGTERM, lambda *_: print('heard', flush=True))\n"
        "print(os.getpid(), flush=True)\n"
        "while True: time.sleep(1)"
    )
    pids = pids_of(job)
    assert job.stdout is not None
    job.send_signal(signal.SIGTERM)
    assert [job.stdout.readline()[4:] for _ in range(2)] == ["heard\n"] * 2
    asked = time.monotonic()
    job.send_signal(signal.SIGTERM)
    job.communicate(timeout=PATIENCE)
    # The first one alone gives the ranks ten seconds.
    assert time.monotonic() - asked < 8
    assert job.returncode == 128 + signal.SIGTERM
    assert not any(map(alive, pids))


def test_a_signal_before_all_ranks_have_joined(
    start: Start, tmp_path: Path, temporary: Path
) -> None:
    """One of the two programs that this mpirun starts is no rank, or none yet."""
    pid = tmp_path / "pid"
    starter = tmp_path / "mpirun"
    starter.write_text(
        "#!/bin/sh\n"
        '[ "$1" = --version ] && { echo "HYDRA build details:"; exit; }\n'
        "shift 4\n"
        "sleep 1000 &\n"
        f'echo $! > "{pid}"\n'
        'export PMI_RANK=0 PMI_SIZE=2 OMPI_COMM_WORLD_RANK=0 OMPI_COMM_WORLD_SIZE=2; exec "$@"\n'
    )
    starter.chmod(0o755)
    job = start(f"print(os.getpid(), flush=True); {WAIT_FOR_EVER}", options=("--mpirun", starter))
    pids = [*pids_of(job, 1), int(pid.read_text())]
    assert all(map(alive, pids))
    job.send_signal(signal.SIGTERM)
    job.communicate(timeout=PATIENCE)
    assert job.returncode == 128 + signal.SIGTERM
    assert not any(map(alive, pids))
    assert list(temporary.iterdir()) == []


def test_a_signal_that_is_ignored_stays_so(start: Start) -> None:
    job = start(f"print(os.getpid(), flush=True); {WAIT_FOR_EVER}", before=("nohup",))
    pids = pids_of(job)
    job.send_signal(signal.SIGHUP)
    assert not wait_until(lambda: job.poll() is not None, 2.0)
    assert all(map(alive, pids))


def test_sigquit_shows_where_each_rank_stands(start: Start) -> None:
    job = start(f"def stuck(): {WAIT_FOR_EVER}\nprint(os.getpid(), flush=True); stuck()")
    pids = pids_of(job)
    job.send_signal(signal.SIGQUIT)
    assert job.stderr is not None
    lines = []
    while sum("in stuck" in line for line in lines) < 2:
        lines.append(job.stderr.readline())
        assert lines[-1], lines
    assert all(map(alive, pids))


def test_a_signal_after_the_time_limit_gives_no_more_time(start: Start) -> None:
    job = start(
        "import signal\n"
        "for number in (signal.SIGINT, signal.SIGTERM): signal.signal(number, signal.SIG_IGN)\n"
        f"print(os.getpid(), flush=True); {WAIT_FOR_EVER}",
        options=("--timeout", 4),
    )
    pids_of(job)
    assert job.stderr is not None
    while "in <module>" not in job.stderr.readline():
        pass
    stacks = time.monotonic()
    job.send_signal(signal.SIGINT)
    job.communicate(timeout=PATIENCE)
    assert job.returncode == 124
    assert time.monotonic() - stacks < 8


def test_a_rank_past_its_script_still_hears_signals(start: Start) -> None:
    job = start(
        "import signal, threading\n"
        "gone = threading.Event()\n"
        "signal.signal(signal.SIGUSR1, lambda *_: gone.set())\n"
        "def last():\n"
        "    while not gone.wait(0.05): pass\n"
        "    print('heard', flush=True)\n"
        "threading.Thread(target=last).start()\n"
        "threading.Timer(1.0, lambda: print(os.getpid(), flush=True)).start()"
    )
    pids_of(job)
    job.send_signal(signal.SIGUSR1)
    out, err = job.communicate(timeout=PATIENCE)
    assert job.returncode == 0, err
    assert out.count("heard") == 2


def test_a_rank_stuck_past_its_script_shows_where(launch: Launch) -> None:
    done = launch(
        f"import threading\ndef stuck(): {WAIT_FOR_EVER}\nthreading.Thread(target=stuck).start()",
        options=("--timeout", 5),
    )
    assert done.code == 124
    assert done.err.count("in stuck") == 2
