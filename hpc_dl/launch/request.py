"""What a user asks of a launch, and the one call that carries it out."""

import contextlib
import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO

from hpc_dl.errors import MissingComponentError, OptionError
from hpc_dl.launch import channel, terminal
from hpc_dl.launch.job import Job, run
from hpc_dl.launch.mpirun import (
    VARIABLE,
    Mpirun,
    find_mpirun,
    start_environment,
    start_options,
)
from hpc_dl.launch.screen import Screen
from hpc_dl.launch.verdict import Verdict

#: Seconds without a reader after which the output of a job that was ended is given up.
UNREAD = 2.0


@dataclass(frozen=True)
class Request:
    """A launch on this machine.

    Args:
        script: the Python script, or the module's name if ``module`` is set.
        arguments: its arguments.
        ranks: how many ranks run it.
        module: run it as ``python -m`` does.
        timeout: seconds after which the job is ended; None for no limit.
        prefix: begin each line with its rank.
        mpirun: the program that starts ranks; None to find it.
        mpirun_options: more options for that program.
        environment: variables to set for the ranks.
    """

    script: str
    arguments: Sequence[str] = ()
    ranks: int = 1
    module: bool = False
    timeout: float | None = None
    prefix: bool = True
    mpirun: str | None = None
    mpirun_options: Sequence[str] = ()
    environment: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.ranks < 1:
            raise OptionError(f"-n {self.ranks}: the number of ranks must be 1 or more")
        if self.timeout is not None and not self.timeout > 0:
            raise OptionError(f"--timeout {self.timeout:g}: give a number of seconds above 0")
        if not self.module and not Path(self.script).is_file():
            raise OptionError(
                f"there is no script {self.script!r} in {os.getcwd()}; name a file, or a module "
                "with -m"
            )


def cores() -> int:
    """Return how many cores this process may use."""
    return len(os.sched_getaffinity(0))


def plan(request: Request, mpirun: Mpirun | None, environ: Mapping[str, str]) -> Job:
    """Return the command and the environment that carry out the request.

    Args:
        request: what to run.
        mpirun: the program that starts the ranks; None to start a single one directly.
        environ: the present environment.
    """
    worker = [sys.executable, "-m", "hpc_dl.launch.worker"]
    worker += ["-m", request.script] if request.module else [request.script]
    worker += request.arguments
    environment = start_environment(mpirun, environ)
    # Each rank's math library would otherwise take all cores, and the ranks fight for them.
    environment.setdefault("OMP_NUM_THREADS", str(max(1, cores() // request.ranks)))
    if mpirun is not None and mpirun.family == "openmpi" and request.ranks > cores():
        # A rank that waits would else keep the core that the rank it waits for needs.
        environment.setdefault("OMPI_MCA_mpi_yield_when_idle", "1")
    environment.update(request.environment)
    command = worker
    if mpirun is not None:
        exported = (channel.SOCKET, channel.EXPECTED_SIZE, "OMP_NUM_THREADS", *request.environment)
        names = tuple(dict.fromkeys(exported))
        options = start_options(mpirun, request.ranks, names, request.mpirun_options)
        command = [os.fspath(mpirun.path), *options, *request.mpirun_options, *worker]
    return Job(command, environment, request.ranks, request.timeout)


def launch(request: Request, out: BinaryIO, err: BinaryIO) -> Verdict:
    """Run the request on this machine and show its output.

    Args:
        request: what to run.
        out: the user's stdout.
        err: the user's stderr.

    Returns:
        how it went; its message is already shown.

    Raises:
        MissingComponentError: there is no mpirun, and more than one rank is asked for.
    """
    interactive = out.isatty()
    coloured = not os.environ.get("NO_COLOR")
    screen = Screen(
        out,
        err,
        prefix=request.prefix and request.ranks > 1,
        colour=(coloured and interactive, coloured and err.isatty()),
        terminal=interactive,
    )
    job = plan(request, _starter(request, screen), os.environ)
    with contextlib.ExitStack() as stack:
        drawn = stack.enter_context(terminal.opened(out.fileno())) if interactive else None
        verdict = run(job, screen, drawn)
    if verdict.code != 0:
        _explain(screen, verdict)
    screen.close(UNREAD if verdict.from_outside else None)
    return verdict


def _starter(request: Request, screen: Screen) -> Mpirun | None:
    try:
        return find_mpirun(request.mpirun, os.environ)
    except MissingComponentError:
        if request.ranks > 1 or request.mpirun or os.environ.get(VARIABLE):
            raise
        screen.line(b"hpc-dl launch: no mpirun here; the one rank runs without MPI", error=True)
        return None


def _explain(screen: Screen, verdict: Verdict) -> None:
    screen.restore()
    for text, rank in ((verdict.noise, None), (verdict.traceback, verdict.blamed)):
        for line in text.strip("\n").splitlines():
            screen.line(line.encode(errors="replace"), rank, error=True)
    for line in verdict.message.splitlines():
        screen.line(f"hpc-dl launch: {line}".encode(errors="replace"), error=True)
