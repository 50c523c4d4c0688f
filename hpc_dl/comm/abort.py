"""End the whole job when one rank fails, with that rank's traceback.

Without this a rank that raises would wait in ``MPI_Finalize`` while the others wait
for it in a collective: a hang instead of an error.
"""

import atexit
import os
import sys
import threading
import traceback
from types import TracebackType
from typing import Any, NoReturn

#: What launchers call the rank of a process, the common ones first.
RANK_VARIABLES = ("OMPI_COMM_WORLD_RANK", "PMIX_RANK", "PMI_RANK", "SLURM_PROCID")


def rank_label() -> str:
    """Name this process by its rank for an error message, without touching MPI."""
    for name in RANK_VARIABLES:
        if name in os.environ:
            return f"rank {os.environ[name]}"
    return "rank 0"


def end_job(code: int) -> NoReturn:
    """Flush the output and end every rank of the job with ``code``; does not return.

    Uses ``MPI_Abort`` where mpi4py runs; otherwise this process exits at once without
    finalising, which every launcher takes as the failure of the job.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    mpi = sys.modules.get("mpi4py.MPI")
    if mpi is not None and mpi.Is_initialized() and not mpi.Is_finalized():
        mpi.COMM_WORLD.Abort(code)
    os._exit(code)


def report_and_end(
    kind: type[BaseException], error: BaseException | None, trace: TracebackType | None
) -> None:
    """Print the traceback under this rank's name, then end the job; an ``excepthook``."""
    text = "".join(traceback.format_exception(kind, error, trace))
    sys.stderr.write(f"hpc_dl: {rank_label()} failed; ending the job\n{text}")
    end_job(130 if issubclass(kind, KeyboardInterrupt) else 1)


def _report_thread(args: "threading.ExceptHookArgs") -> None:
    if not issubclass(args.exc_type, SystemExit):
        report_and_end(args.exc_type, args.exc_value, args.exc_traceback)


class _Leaving(SystemExit):
    """What ``sys.exit`` raises, to learn whether it left the program or was caught.

    Python calls no hook for this exception. Where it is not caught, the interpreter drops it
    when no code of the program is running any more.
    """

    status = 0

    def __del__(self) -> None:
        if sys._getframe().f_back is None:
            _Leaving.status = self.code if isinstance(self.code, int) else int(bool(self.code))


def _exit(status: Any = None, /) -> NoReturn:
    """Raise SystemExit, as Python's own ``sys.exit`` does."""
    raise _Leaving(status)


def _end_job_after_failed_exit() -> None:
    if _Leaving.status:
        sys.stderr.write(
            f"hpc_dl: {rank_label()} left with exit code {_Leaving.status}; ending the job\n"
        )
        end_job(_Leaving.status)


def install() -> None:
    """Make an unhandled exception on any thread of this rank end the whole job.

    So does ``sys.exit`` with another code than 0.
    """
    if sys.exit is _exit:
        return
    sys.excepthook = report_and_end
    threading.excepthook = _report_thread
    sys.exit = _exit
    atexit.register(_end_job_after_failed_exit)
