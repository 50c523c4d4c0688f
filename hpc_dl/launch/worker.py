"""Run a script as one rank: ``python -m hpc_dl.launch.worker [-m] SCRIPT ARGS...``.

The rank tells its launcher how it ended, and takes the whole job with it when it fails. It
also works without a launcher, directly under ``mpirun`` or ``srun``.
"""

import contextlib
import faulthandler
import os
import runpy
import signal
import socket
import sys
import traceback
from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import NoReturn

from hpc_dl.launch import channel
from hpc_dl.launch.channel import End, Failure, Hello, Stream

_RANKS = ("OMPI_COMM_WORLD_RANK", "PMIX_RANK", "PMI_RANK")
_SIZES = ("OMPI_COMM_WORLD_SIZE", "PMI_SIZE")

#: Files whose frames belong to the machinery that runs the script, not to the script.
_MACHINERY = (__file__, runpy.__file__ or "<frozen runpy>", "<frozen runpy>")

_GOOD = End(0)


def first_number(names: Sequence[str], environ: Mapping[str, str], default: int) -> int:
    """Return the first of these variables that holds a number."""
    for name in names:
        if environ.get(name, "").isdigit():
            return int(environ[name])
    return default


def main(arguments: Sequence[str]) -> None:
    """Run the script that ``arguments`` name, as this rank."""
    faulthandler.enable()
    # The launcher asks each rank where it stands before it ends a job that hangs.
    faulthandler.register(signal.SIGQUIT, all_threads=True)
    control: socket.socket | None = None
    rank = os.getpid()
    try:
        control = _join_launcher(first_number(_RANKS, os.environ, 0), os.environ)
        # Also where the script turns its errors elsewhere, as pytest does.
        faulthandler.register(signal.SIGQUIT, file=os.dup(2), all_threads=True)
        expected = first_number((channel.EXPECTED_SIZE,), os.environ, 0)
        _check_start(first_number(_SIZES, os.environ, 1), expected)
        end = _run(arguments)
        if os.getpid() != rank:
            _leave_child(end)
        if end.code == 0:
            _check_world(expected)
    except BaseException as error:
        if os.getpid() != rank:
            trace = _script_part(error.__traceback__)
            traceback.print_exception(type(error), error, trace)
            _leave_child(End(1))
        _fail(control, error)
    if end.code != 0:
        if end.summary and control is None:
            print(end.summary, file=sys.stderr)
        _end(control, end)
    # Threads and what the script left to do at exit may still run: the connection stays open,
    # so that signals reach this rank to its very end.
    _tell(control, end)


def _leave_child(end: End) -> NoReturn:
    """Leave a process that the script forked: its end is not the rank's."""
    try:
        if end.summary:
            print(end.summary, file=sys.stderr)
        sys.stdout.flush()
        sys.stderr.flush()
    finally:  # whatever became of these streams
        os._exit(end.code)


def _run(arguments: Sequence[str]) -> End:
    """Run the script to its end; return what it left with."""
    try:
        if arguments[0] == "-m":
            sys.argv = list(arguments[1:])
            sys.path[0] = os.getcwd()
            runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
        else:
            sys.argv = list(arguments)
            sys.path[0] = os.path.dirname(os.path.abspath(sys.argv[0]))
            runpy.run_path(sys.argv[0], run_name="__main__")
    except Failure as failure:
        return End(failure.status, str(failure))
    except SystemExit as leaving:
        return End(*exit_code(leaving.code))
    return _GOOD


def exit_code(status: object) -> tuple[int, str]:
    """Translate the argument of ``sys.exit`` into an exit code and a message.

    >>> exit_code("no such file")
    (1, 'no such file')
    """
    if status is None:
        return 0, ""
    if isinstance(status, int):
        return status & 0xFF or (1 if status else 0), ""
    return 1, str(status)


def _join_launcher(rank: int, environ: Mapping[str, str]) -> socket.socket | None:
    path = environ.get(channel.SOCKET)
    if path is None:
        return None
    control = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        control.connect(path)
    except OSError as error:
        raise _out_of_reach(path, error) from None
    # A child that the script forks does not speak for the rank, nor keep it alive.
    os.register_at_fork(after_in_child=control.close)
    terminal = environ.get(channel.TERMINAL) if rank == 0 else None
    redirected: dict[Stream, int] = {}
    if terminal is None:
        redirected["stdout"] = 1
    if not environ.get(channel.MERGED):
        redirected["stderr"] = 2
    # Pipes, as sockets cannot be opened again by way of /dev/stdout.
    pipes = [os.pipe() for _ in redirected]
    hello = Hello(rank, os.getpid(), tuple(redirected))
    # Before any output: whoever sees it can count on signals reaching the rank.
    socket.send_fds(control, [channel.encode(hello)], [reading for reading, _ in pipes])
    for descriptor, (reading, writing) in zip(redirected.values(), pipes, strict=True):
        os.dup2(writing, descriptor)
        os.close(writing)
        os.close(reading)
    if terminal is not None:
        screen = os.open(terminal, os.O_RDWR | os.O_NOCTTY)
        os.dup2(screen, 1)
        os.close(screen)
    if environ.get(channel.MERGED):
        os.dup2(1, 2)
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(AttributeError):
            stream.reconfigure(line_buffering=True)  # type: ignore[union-attr]
    return control


def _out_of_reach(path: str, error: OSError) -> Exception:
    from hpc_dl.errors import LaunchError

    return LaunchError(
        f"this rank runs on {socket.gethostname()} and cannot reach its launcher at {path} "
        f"({error.strerror}); `hpc-dl launch` serves one machine. On several, start "
        "`python -m hpc_dl.launch.worker SCRIPT` with your site's mpirun or srun"
    )


def _check_start(size: int, expected: int) -> None:
    if expected and size != expected:
        raise _wrong_size(size, expected)


def _check_world(expected: int) -> None:
    """Compare the world that the script's own libraries saw with the one asked for."""
    if not expected:
        return
    mpi = sys.modules.get("mpi4py.MPI")
    if mpi is not None and mpi.Is_initialized() and not mpi.Is_finalized():
        size = mpi.COMM_WORLD.Get_size()
        if size != expected:
            raise _wrong_size(size, expected)
    for name in ("horovod.torch", "horovod.tensorflow"):
        horovod = sys.modules.get(name)
        if horovod is not None and horovod.is_initialized() and horovod.size() != expected:
            raise _wrong_size(horovod.size(), expected)


def _wrong_size(size: int, expected: int) -> Exception:
    from hpc_dl.errors import LaunchError

    return LaunchError(
        f"{expected} ranks were started, but this one sees a world of {size}: the mpirun that "
        "started it and the MPI library it loads do not belong together (or srun was given "
        "another --mpi than this library speaks). Next step: `hpc-dl doctor`; then name the "
        "mpirun of that library with --mpirun"
    )


def _fail(control: socket.socket | None, error: BaseException) -> None:
    trace = _script_part(error.__traceback__)
    if control is None:
        from hpc_dl.comm.abort import report_and_end

        report_and_end(type(error), error, trace)
    interrupted = isinstance(error, KeyboardInterrupt)
    text = "" if interrupted else "".join(traceback.format_exception(type(error), error, trace))
    summary = summarise(error)
    code = 128 + signal.SIGINT if interrupted else 1
    _end(control, End(code, summary, text[-channel.TRACEBACK_LIMIT :]))


def summarise(error: BaseException) -> str:
    r"""Return the one line of a traceback that names the error.

    >>> summarise(ValueError("no such layer\nsee the list"))
    'ValueError: no such layer'
    """
    lines = "".join(traceback.format_exception_only(error)).strip().splitlines()
    name = type(error).__name__
    return next((line for line in lines if line.split(":")[0].endswith(name)), lines[-1])


def _script_part(trace: TracebackType | None) -> TracebackType | None:
    """Cut the frames off that ran the script."""
    while trace is not None and trace.tb_frame.f_code.co_filename in _MACHINERY:
        trace = trace.tb_next
    return trace


def _end(control: socket.socket | None, end: End) -> NoReturn:
    try:
        with contextlib.suppress(OSError, ValueError):  # the script may have closed them
            sys.stdout.flush()
            sys.stderr.flush()
        _tell(control, end)
        from hpc_dl.comm.abort import end_job

        end_job(end.code)
    finally:  # whatever the script did to this interpreter
        os._exit(end.code)


def _tell(control: socket.socket | None, end: End) -> None:
    if control is not None:
        with contextlib.suppress(OSError):  # a launcher that is gone needs no report
            control.sendall(channel.encode(end))
        control.detach()  # left to the end of this process


if __name__ == "__main__":
    main(sys.argv[1:])
