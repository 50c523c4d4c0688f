"""Whoever reads the output, or does not: it arrives whole, and the job is looked after."""

import os
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

from launches import PATIENCE, PROMPT, Start, alive, command, pids_of
from waiting import wait_until


def test_a_reader_that_goes_away_ends_the_job(start: Start, temporary: Path) -> None:
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
    assert list(temporary.iterdir()) == []


def test_a_slow_reader_gets_every_line(start: Start) -> None:
    count, ranks = 400, 2
    # In one piece, which fills all that lies between a rank and the launcher.
    job = start(f"os.write(1, b''.join(b'%d %s\\n' % (i, b'x' * 1000) for i in range({count})))")
    assert job.stdout is not None
    output = b""
    # What the ranks wrote last takes seconds more than they live.
    while data := os.read(job.stdout.fileno(), 1 << 13):
        output += data
        time.sleep(0.05)
    assert job.wait(timeout=PATIENCE) == 0
    lines = output.decode().splitlines()
    for rank in range(ranks):
        mine = [int(line.split()[1]) for line in lines if line.startswith(f"[{rank}] ")]
        assert mine == list(range(count))


def test_a_time_limit_does_not_wait_for_the_reader(start: Start) -> None:
    job = start(
        "print(os.getpid(), flush=True)\nwhile True: print('x' * 1000)",
        options=("--timeout", 4),
    )
    assert wait_until(lambda: job.poll() is not None, PATIENCE)  # nobody has read a line
    out, err = job.communicate(timeout=PATIENCE)
    assert job.returncode == 124
    assert "still running after 4 s" in err
    assert "nobody read the last" in err
    assert not any(alive(int(line.split()[-1])) for line in out.splitlines()[:1])


def test_a_signal_does_not_wait_for_the_reader(start: Start) -> None:
    job = start("print(os.getpid(), flush=True)\ntime.sleep(0.5)\nwhile True: print('x' * 1000)")
    pids = pids_of(job)
    time.sleep(3)  # everything between the ranks and here is full
    job.send_signal(signal.SIGTERM)
    assert wait_until(lambda: not any(map(alive, pids)), PATIENCE)
    assert wait_until(lambda: job.poll() is not None, PATIENCE)
    assert job.returncode == 128 + signal.SIGTERM


def test_a_failing_rank_ends_the_job_without_a_reader(start: Start) -> None:
    job = start(
        "print(os.getpid(), flush=True); time.sleep(1)\n"
        "end = time.monotonic() + 3\n"
        "while RANK == 0 or time.monotonic() < end:\n"
        "    if RANK == 0: print('x' * 1000)\n"
        "    else: time.sleep(0.1)\n"
        "raise ValueError('boom')"
    )
    pids = pids_of(job)
    assert wait_until(lambda: not any(map(alive, pids)), PATIENCE)
    _, err = job.communicate(timeout=PATIENCE)
    assert job.returncode == 1
    assert "[1] ValueError: boom" in err


def test_dev_stdout_can_be_opened(write: Callable[[str], Path]) -> None:
    script = write(
        "import subprocess\n"
        "with open('/dev/stdout', 'w') as out: print('opened', file=out)\n"
        "with open('/dev/stderr', 'w') as err: print('opened too', file=err)\n"
        "subprocess.run('echo shell > /dev/stderr', shell=True, check=True)"
    )
    done = subprocess.run(
        command("-n", 2, script),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=PATIENCE,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert sorted(done.stdout.splitlines()) == ["[0] opened", "[1] opened"]
    assert sorted(done.stderr.splitlines()) == [
        *("[0] opened too", "[0] shell", "[1] opened too", "[1] shell")
    ]
