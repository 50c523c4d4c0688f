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
from types import FrameType

from hpc_dl.errors import LaunchError
from hpc_dl.launch import channel, processes
from hpc_dl.launch.connections import Switchboard
from hpc_dl.launch.screen import Screen
from hpc_dl.launch.terminal import Terminal
from hpc_dl.launch.verdict import Facts, Verdict, judge

#: Signals to end on; the others are only passed on to the ranks.
ENDING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
PASSED_ON = (signal.SIGUSR1, signal.SIGUSR2)

#: Seconds that mpirun has to end the job after a rank failed, before the launcher does it.
FAILURE_GRACE = 2.0
#: Seconds that ranks have to print where they stand, and then to end, after a time-out.
STACK_GRACE = 1.0
END_GRACE = 2.0
#: Seconds to wait for output after mpirun has gone.
DRAIN = 1.0
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


def run(job: Job, screen: Screen, terminal: Terminal | None, *, merged: bool) -> Verdict:
    """Run the job to its end and judge it.

    Args:
        job: what to run.
        screen: where output goes.
        terminal: what rank 0 draws on, if the user sits at a terminal.
        merged: stdout and stderr end in the same file; keep their order.

    Raises:
        LaunchError: the program could not be started at all.
    """
    switchboard = Switchboard(screen)
    try:
        return _Run(job, screen, switchboard, terminal).to_the_end(merged)
    finally:
        processes.sweep(switchboard.path)
        switchboard.close()


@contextlib.contextmanager
def _caught() -> Iterator[deque[int]]:
    """Collect the signals that arrive, instead of acting on them."""
    arrived: deque[int] = deque()

    def note(number: int, _frame: FrameType | None) -> None:
        arrived.append(number)

    before = {number: signal.signal(number, note) for number in (*ENDING, *PASSED_ON)}
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
        self._stopped_by: int | None = None
        self._timed_out = False
        self._forced = False
        #: What is still to be sent, and when, to end the job: (time, signal) in order.
        self._escalation: deque[tuple[float, int]] = deque()

    def to_the_end(self, merged: bool) -> Verdict:
        environment = {
            **self._job.environment,
            channel.SOCKET: self._board.path,
            channel.EXPECTED_SIZE: str(self._job.size),
        }
        if self._terminal is not None:
            environment[channel.TERMINAL] = self._terminal.path
        if merged:
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
                preexec_fn=processes.die_with_parent,
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
        watched = {pipe}
        if self._terminal is not None:
            watched.add(self._terminal.master)
        for descriptor in watched:
            self._board.watch(descriptor)
        deadline = None if self._job.timeout is None else time.monotonic() + self._job.timeout
        drained_by: float | None = None
        settle_at = time.monotonic() + _SETTLE
        while True:
            for descriptor in self._board.turn(_TICK):
                if descriptor != pipe and self._terminal is not None:
                    self._screen.draw(self._terminal.read())
                elif not self._hear(descriptor):
                    self._board.unwatch(descriptor)
                    watched.discard(descriptor)
            now = time.monotonic()
            if now > settle_at:
                self._screen.settle()
                settle_at = now + _SETTLE
            code = mpirun.poll()
            if code is not None:
                drained_by = now + DRAIN if drained_by is None else drained_by
                if not (self._board.open or pipe in watched) or now > drained_by:
                    break
                continue
            while signals:
                self._on_signal(signals.popleft(), mpirun, now)
            if deadline is not None and now > deadline and not self._timed_out:
                self._timed_out = True
                self._plan(now, (0, signal.SIGQUIT), (STACK_GRACE, signal.SIGTERM))
            if not self._escalation and self._a_rank_failed():
                self._plan(now + FAILURE_GRACE, (0, signal.SIGTERM))
            self._escalate(mpirun, now)
        while self._terminal is not None and (rest := self._terminal.read()):
            self._screen.draw(rest)
        self._screen.settle()
        return code

    def _hear(self, descriptor: int) -> bool:
        """Keep what mpirun itself says (it goes unread unless it explains a failure)."""
        try:
            data = os.read(descriptor, 1 << 16)
        except BlockingIOError:
            return True
        self._noise = (self._noise + data)[-(1 << 16) :]
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
