"""The job that this process is part of: started by ``init``, ended by ``shutdown``."""

import atexit
import contextlib
import logging
import os
import sys
import threading
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from hpc_dl.comm import Choice, Communicator, SerialCommunicator, ThreadsCommunicator, make
from hpc_dl.comm import abort as job_abort
from hpc_dl.comm.base import BaseCommunicator
from hpc_dl.errors import NotInitializedError, OptionError
from hpc_dl.world.group import Group

if TYPE_CHECKING:
    from hpc_dl.world.process_sets import ProcessSet

log = logging.getLogger("hpc_dl")

NOT_INITIALIZED = (
    "hpc_dl is not initialised; call init() first (import hpc_dl.torch as hvd; hvd.init())"
)


class World:
    """All ranks of the job, and the groups formed of them."""

    def __init__(self, comm: Communicator, choice: Choice, framework: str | None):
        self.comm, self.choice, self.framework = comm, choice, framework
        self.group = Group(comm)
        self.process_sets: dict[int, ProcessSet] = {}
        self._sets_made = 0

    def next_set_id(self) -> int:
        """Return an id for a new process set; 0 is the set of all ranks."""
        self._sets_made += 1
        return self._sets_made


class _Worlds(threading.local):
    """The world of a thread that is a rank of its own (the communicator ``threads``)."""

    world: World | None = None


_process_world: World | None = None
_thread_worlds = _Worlds()


def _running() -> World | None:
    return _thread_worlds.world or _process_world


def current() -> World:
    """Return the running world.

    Raises:
        NotInitializedError: ``init`` has not been called, or ``shutdown`` has.
    """
    world = _running()
    if world is None:
        raise NotInitializedError(NOT_INITIALIZED)
    return world


def is_initialized() -> bool:
    """Tell whether ``init`` has been called and ``shutdown`` has not."""
    return _running() is not None


def start(comm: Any, framework: str | None) -> World:
    """Start the world over ``comm``; see ``init``."""
    global _process_world
    if (running := _running()) is not None:
        return running
    communicator, choice = _communicator(comm, framework)
    _show_log()
    _watch_for_stalls(communicator)
    world = World(communicator, choice, framework)
    if isinstance(communicator, ThreadsCommunicator):
        _thread_worlds.world = world
        return world
    if communicator.size > 1:
        job_abort.install()
    _process_world = world
    if communicator.rank == 0:
        log.info("communicator %s, %d rank(s): %s", choice.spec, communicator.size, choice.reason)
    return world


def shutdown() -> None:
    """End the world: finish what is pending and free communicators. All ranks call it."""
    global _process_world
    world = _running()
    if world is None:
        return
    if _thread_worlds.world is not None:
        _thread_worlds.world = None
    else:
        _process_world = None
    world.comm.close()


def _communicator(comm: Any, framework: str | None) -> tuple[Communicator, Choice]:
    if comm is None:
        return make("auto", framework)
    if isinstance(comm, str):
        return make(comm, framework)
    if isinstance(comm, BaseCommunicator):
        return comm, Choice(comm.name, "given to init()")
    mpi = sys.modules.get("mpi4py.MPI")
    if mpi is not None and isinstance(comm, mpi.Comm):
        from hpc_dl.comm.mpi import MpiCommunicator

        return MpiCommunicator(comm), Choice("mpi", "an MPI communicator was given to init()")
    if isinstance(comm, Sequence):
        return _of_ranks(comm, framework)
    raise OptionError(
        f"init(comm={comm!r}): give None, a spec such as 'mpi', an mpi4py communicator, or a list "
        "of ranks"
    )


def _of_ranks(ranks: Sequence[int], framework: str | None) -> tuple[Communicator, Choice]:
    """Make a world of some ranks; each rank outside it gets a world of its own."""
    whole, choice = make("auto", framework)
    wanted = sorted({int(rank) for rank in ranks}) or list(range(whole.size))
    if wanted[0] < 0 or wanted[-1] >= whole.size:
        raise OptionError(f"init(comm={list(ranks)}): valid ranks are 0..{whole.size - 1}")
    if len(wanted) == whole.size:
        return whole, choice
    part = whole.split(0 if whole.rank in wanted else None)
    return part or SerialCommunicator(), Choice(choice.spec, f"ranks {wanted} of {whole.size}")


def _show_log() -> None:
    """Let the log lines be seen where the script has not set up logging."""
    if not logging.getLogger().handlers and not log.handlers:
        handler = logging.StreamHandler()
        handler.setFormatter(logging.Formatter("hpc_dl: %(message)s"))
        log.addHandler(handler)
        log.setLevel(logging.INFO)


def _watch_for_stalls(comm: Communicator) -> None:
    if isinstance(comm, BaseCommunicator):
        for variable, attribute in (
            ("HPC_DL_STALL_WARN_SECONDS", "warn_seconds"),
            ("HPC_DL_STALL_ABORT_SECONDS", "abort_seconds"),
        ):
            text = os.environ.get(variable)
            if text is not None:
                setattr(comm.watch, attribute, _seconds(variable, text))


def _seconds(variable: str, text: str) -> float:
    with contextlib.suppress(ValueError):
        if (seconds := float(text)) >= 0:
            return seconds
    raise OptionError(f"{variable}={text!r}; give a number of seconds, 0 or more (0: never)")


@atexit.register
def _at_exit() -> None:
    """Let queued collectives end before MPI is finalised."""
    if _process_world is not None and isinstance(_process_world.comm, BaseCommunicator):
        _process_world.comm.quiesce()
