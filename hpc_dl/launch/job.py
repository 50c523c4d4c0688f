"""Run one job: start its ranks, show what they print, and leave nothing behind."""

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from types import FrameType

from hpc_dl.errors import LaunchError
from hpc_dl.launch import channel, processes
from hpc_dl.launch.connections import Switchboard
from hpc_dl.launch.screen import Screen
from hpc_dl.launch.terminal import Terminal
from hpc_dl.launch.verdict import Facts, Verdict, judge

#: Signals to end on; the others are only passed on to the ranks.
ENDING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
PASSED_ON = (signal.SIGUSR1, signal.SIGUSR2, signal.SIGQUIT)

#: Seconds that mpirun has to end the job after a rank failed, before the launcher does it.
FAILURE_GRACE = 2.0
#: Seconds that ranks have to print where they stand, and then to end, after a time-out.
STACK_GRACE = 1.0
END_GRACE = 2.0
#: Seconds that processes which the ranks started may live on after a job that went well.
LINGER = 1.0
#: Seconds between looks at whether rank 0 leaves its line on the terminal unfinished.
_SETTLE = 0.3
_TICK = 0.1


@dataclass(frozen=True)
class Job:
    """What to run.

    Args:
        command: the program that starts all ranks, with its arguments.
        environment: its environment.
        size: the number of ranks it is to start.
        timeout: seconds after which the job is ended; None for no limit.
        grace: seconds that ranks have to finish on SIGINT, SIGTERM or SIGHUP.
    """

    command: Sequence[str]
    environment: Mapping[str, str]
    size: int
    timeout: float | None = None
    grace: float = 10.0


def run(job: Job, screen: Screen, terminal: Terminal | None) -> Verdict:
    """Run the job to its end and judge it.

    Args:
        job: what to run.
        screen: where output goes.
        terminal: what rank 0 draws on, if the user sits at a terminal.

    Raises:
        LaunchError: the program could not be started at all.
    """
    switchboard = Switchboard(screen)
    try:
        return _Run(job, screen, switchboard, terminal).to_the_end()
    finally:
        try:
            processes.sweep(switchboard.path)
        finally:
            switchboard.close()


@contextlib.contextmanager
def _caught() -> Iterator[deque[int]]:
    """Collect the signals that arrive, instead of acting on them.

    A signal that is ignored stays so: nohup, for one, starts its command like that.
    """
    arrived: deque[int] = deque()

    def note(number: int, _frame: FrameType | None) -> None:
        arrived.append(number)

    heeded = [n for n in (*ENDING, *PASSED_ON) if signal.getsignal(n) is not signal.SIG_IGN]
    before = {number: signal.signal(number, note) for number in heeded}
    try:
        yield arrived
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


class _Run:
    """One run of a job, and the steps by which it is ended when it must be."""

    def __init__(
        self, job: Job, screen: Screen, switchboard: Switchboard, terminal: Terminal | None
    ) -> None:
        self._job = job
        self._screen = screen
        self._board = switchboard
        self._terminal = terminal
        self._noise = b""
        #: mpirun has closed its own output.
        self._deaf = False
        self._settle_at = 0.0
        self._stopped_by: int | None = None
        self._timed_out = False
        self._forced = False
        #: What is still to be sent, and when, to end the job: (time, signal) in order.
        self._escalation: deque[tuple[float, int]] = deque()

    def to_the_end(self) -> Verdict:
        environment = {
            **self._job.environment,
            channel.SOCKET: self._board.path,
            channel.EXPECTED_SIZE: str(self._job.size),
        }
        if self._terminal is not None:
            environment[channel.TERMINAL] = self._terminal.path
        if self._screen.merged:
            environment[channel.MERGED] = "1"
        with _caught() as signals, self._started(environment) as mpirun:
            code = self._follow(mpirun, signals)
        facts = Facts(
            self._job.size,
            dict(self._board.ends),
            frozenset(self._board.pids),
            code,
            self._noise.decode(errors="replace"),
            tuple(self._board.lost),
            self._forced,
            self._stopped_by,
            self._job.timeout if self._timed_out else None,
        )
        return judge(facts)

    @contextlib.contextmanager
    def _started(self, environment: Mapping[str, str]) -> Iterator["subprocess.Popen[bytes]"]:
        try:
            mpirun = subprocess.Popen(
                list(self._job.command),
                env=dict(environment),
                # A terminal would stop a job in the background that reads from it.
                stdin=subprocess.DEVNULL if sys.stdin is None or sys.stdin.isatty() else None,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                # Ctrl-C reaches the launcher alone, which passes it on in good order.
                start_new_session=True,
                preexec_fn=partial(processes.die_with_parent, os.getpid()),
            )
        except OSError as error:
            raise LaunchError(f"could not start `{self._job.command[0]}`: {error}") from error
        try:
            yield mpirun
        finally:
            if mpirun.poll() is None:
                mpirun.kill()
                mpirun.wait()
            if mpirun.stdout is not None:
                mpirun.stdout.close()

    def _follow(self, mpirun: "subprocess.Popen[bytes]", signals: deque[int]) -> int:
        assert mpirun.stdout is not None
        pipe = mpirun.stdout.fileno()
        os.set_blocking(pipe, False)
        self._board.watch(pipe, partial(self._hear, pipe))
        if self._terminal is not None:
            self._board.watch(self._terminal.master, self._draw, output=True)
        deadline = None if self._job.timeout is None else time.monotonic() + self._job.timeout
        while (code := mpirun.poll()) is None:
            self._serve()
            now = time.monotonic()
            while signals:
                self._on_signal(signals.popleft(), mpirun, now)
            if deadline is not None and now > deadline and not self._timed_out:
                self._timed_out = True
                self._plan(now, (0, signal.SIGQUIT), (STACK_GRACE, signal.SIGTERM))
            if not self._escalation and self._a_rank_failed():
                self._plan(now + FAILURE_GRACE, (0, signal.SIGTERM))
            self._escalate(mpirun, now)
        limit = time.monotonic() + LINGER
        while code == 0 and self._board.open and not signals and time.monotonic() < limit:
            self._serve()
        # Nobody of the job writes after this, so that "until the end" is soon.
        processes.sweep(self._board.path)
        self._board.finish()
        while self._hear(pipe):
            pass
        while self._draw():
            pass
        self._screen.settle()
        return code

    def _serve(self) -> None:
        self._board.turn(_TICK)
        now = time.monotonic()
        if now > self._settle_at:
            self._screen.settle()
            self._settle_at = now + _SETTLE

    def _draw(self) -> bool:
        """Show what rank 0 drew on its terminal; tell whether there was something."""
        data = b"" if self._terminal is None else self._terminal.read()
        self._screen.draw(data)
        return bool(data)

    def _hear(self, pipe: int) -> bool:
        """Keep what mpirun itself says (it goes unread unless it explains a failure)."""
        try:
            data = os.read(pipe, 1 << 16)
        except BlockingIOError:
            return False
        self._noise = (self._noise + data)[-(1 << 16) :]
        if not data and not self._deaf:
            self._board.unwatch(pipe)
            self._deaf = True
        return bool(data)

    def _a_rank_failed(self) -> bool:
        return bool(self._board.lost) or any(end.code for end in self._board.ends.values())

    def _on_signal(self, number: int, mpirun: "subprocess.Popen[bytes]", now: float) -> None:
        ranks = self._board.present
        if number in PASSED_ON:
            processes.send(ranks, number)
            return
        if self._stopped_by is not None:  # asked twice: at once
            self._plan(now, (0, signal.SIGKILL))
            return
        self._stopped_by = number
        # A rank that has not joined yet can only be reached by way of mpirun.
        complete = len(self._board.pids) == self._job.size
        processes.send(ranks if complete else [mpirun.pid], number)
        if not self._escalation:  # a job that is being ended already gets no more time
            self._plan(now + self._job.grace, (0, signal.SIGTERM))

    def _plan(self, start: float, *steps: tuple[float, int]) -> None:
        self._escalation.clear()
        at = start
        for wait, number in steps:
            at += wait
            self._escalation.append((at, number))
        if steps[-1][1] != signal.SIGKILL:
            self._escalation.append((at + END_GRACE, signal.SIGKILL))

    def _escalate(self, mpirun: "subprocess.Popen[bytes]", now: float) -> None:
        while self._escalation and now >= self._escalation[0][0]:
            _, number = self._escalation.popleft()
            self._forced = self._stopped_by is None and not self._timed_out
            processes.send(self._board.present, number)
            if number != signal.SIGQUIT:
                processes.send([mpirun.pid], number)
