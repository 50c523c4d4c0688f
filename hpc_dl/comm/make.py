"""Make a communicator from its spec, for example ``mpi:cuda=stage``."""

import importlib.util
import inspect
import os
import sys
from collections.abc import Callable
from typing import Any

from hpc_dl.comm.choose import Choice, choose
from hpc_dl.comm.launched import find_launcher
from hpc_dl.comm.protocol import Communicator
from hpc_dl.comm.serial import SerialCommunicator
from hpc_dl.errors import LaunchError, MissingComponentError, OptionError
from hpc_dl.spec import check_options, parse


def _serial(framework: str | None) -> Communicator:
    return SerialCommunicator()


def _mpi(
    framework: str | None, node_size: int = 0, cuda: str = "auto", comm: Any = None
) -> Communicator:
    if importlib.util.find_spec("mpi4py") is None:
        raise MissingComponentError(
            "the communicator 'mpi' needs mpi4py and an MPI; run `pip install 'hpc_dl[mpi]'`, "
            "or load your site's MPI module and `pip install mpi4py`"
        )
    if "mpi4py.MPI" not in sys.modules:
        # Open MPI's one-sided component for UCX prints errors where UCX cannot run; only
        # shared windows are used here, and those have a component of their own.
        os.environ.setdefault("OMPI_MCA_osc", "^ucx")
    from mpi4py import MPI

    from hpc_dl.comm.mpi import MpiCommunicator

    return MpiCommunicator(comm or MPI.COMM_WORLD, node_size=node_size, cuda=cuda)


def _horovod(framework: str | None) -> Communicator:
    from hpc_dl.comm.horovod import make_horovod

    return make_horovod(framework)


_MAKERS: dict[str, Callable[..., Communicator]] = {
    "serial": _serial,
    "mpi": _mpi,
    "horovod": _horovod,
}


def make(spec: str = "auto", framework: str | None = None) -> tuple[Communicator, Choice]:
    """Make the communicator that ``spec`` names, over all ranks of the job.

    Args:
        spec: ``auto``, ``serial``, ``mpi`` (options ``node_size``, ``cuda``) or ``horovod``.
        framework: ``torch`` or ``tensorflow``: the build of Horovod to use.

    Raises:
        OptionError: an unknown name or option; the message lists the valid ones.
        MissingComponentError: what it needs is not installed.
        LaunchError: the ranks did not find each other.
    """
    choice = choose(framework) if spec == "auto" else Choice(spec, "asked for")
    parsed = parse(choice.spec)
    if parsed.name == "threads":
        raise OptionError(
            "the communicator 'threads' lives inside one process; "
            "use hpc_dl.testing.run_threads(size, function)"
        )
    if parsed.name not in _MAKERS:
        raise OptionError.unknown("communicator", parsed.name, [*_MAKERS, "auto"])
    maker = _MAKERS[parsed.name]
    options = [name for name in inspect.signature(maker).parameters if name not in _INTERNAL]
    check_options(parsed, "communicator", options)
    communicator = maker(framework, **parsed.options)
    _check_size(communicator)
    return communicator, choice


_INTERNAL = ("framework", "comm")


def _check_size(communicator: Communicator) -> None:
    """Refuse silent singletons: ranks that each believe to be alone."""
    launcher = find_launcher()
    if launcher is None or launcher.size is None or communicator.name == "serial":
        return
    if communicator.size != launcher.size:
        raise LaunchError(
            f"{launcher.name} started {launcher.size} ranks, but {communicator.name!r} sees "
            f"{communicator.size}: the launcher and the MPI library do not know each other. Use "
            "the mpirun of the MPI that mpi4py loads (`hpc-dl doctor` shows it), or "
            "`srun --mpi=pmix`"
        )
