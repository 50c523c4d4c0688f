"""Which communicator ``init(comm="auto")`` takes, and why."""

import importlib.util
import os
import sys
from pathlib import Path
from typing import NamedTuple

from hpc_dl.comm.launched import find_launcher
from hpc_dl.errors import MissingComponentError


class Choice(NamedTuple):
    """A communicator's spec and the reason it was chosen."""

    spec: str
    reason: str


class Horovod(NamedTuple):
    """What an installed Horovod was built with."""

    frameworks: frozenset[str]
    nccl: bool


def installed_horovod() -> Horovod | None:
    """Look at the files of an installed Horovod, without loading its libraries."""
    found = importlib.util.find_spec("horovod")
    if found is None or not found.submodule_search_locations:
        return None
    home = found.submodule_search_locations[0]

    libraries = {
        framework: path
        for framework, pattern in _LIBRARIES.items()
        for path in Path(home).glob(pattern)
    }
    # A build with NCCL calls it by this name; loading the library to ask would start MPI.
    nccl = any(b"ncclAllReduce" in path.read_bytes() for path in libraries.values())
    return Horovod(frozenset(libraries), nccl)


_LIBRARIES = {"torch": "torch/mpi_lib_v2*.so", "tensorflow": "tensorflow/mpi_lib*.so"}


def gpu_is_there(framework: str | None) -> bool:
    """Ask the framework, if it is loaded, whether it sees a GPU."""
    torch = sys.modules.get("torch")
    if framework in ("torch", None) and torch is not None:
        return bool(torch.cuda.is_available())
    tf = sys.modules.get("tensorflow")
    if framework == "tensorflow" and tf is not None:
        return bool(tf.config.list_physical_devices("GPU"))
    return False


def choose(framework: str | None = None) -> Choice:
    """Choose a communicator for this process.

    Args:
        framework: ``torch`` or ``tensorflow``, whose build of Horovod counts; None: any.

    Raises:
        MissingComponentError: several ranks were launched and nothing can connect them.
    """
    wanted = os.environ.get("HPC_DL_COMM", "")
    if wanted and wanted != "auto":
        return Choice(wanted, "HPC_DL_COMM says so")
    launcher = find_launcher()
    if launcher is None:
        return Choice("serial", "this process was started without a launcher")
    horovod = installed_horovod()
    fits = horovod is not None and (
        framework in horovod.frameworks if framework else bool(horovod.frameworks)
    )
    if launcher.name == "horovodrun":
        if fits:
            return Choice("horovod", "started by horovodrun")
        raise MissingComponentError(_nothing(launcher.name, framework))
    if fits and horovod is not None and horovod.nccl and gpu_is_there(framework):
        return Choice("horovod", "GPUs are there and Horovod is built with NCCL")
    if importlib.util.find_spec("mpi4py") is not None:
        why = "faster than Horovod on CPUs (docs/performance.md)" if fits else "mpi4py is there"
        return Choice("mpi", f"started by {launcher.name}; {why}")
    if fits:
        return Choice("horovod", f"started by {launcher.name}; mpi4py is not installed")
    if launcher.size == 1:
        return Choice("serial", f"started by {launcher.name} with one rank")
    raise MissingComponentError(_nothing(launcher.name, framework))


def _nothing(launcher: str, framework: str | None) -> str:
    return (
        f"several ranks were started by {launcher}, but neither mpi4py nor a Horovod built for "
        f"{framework or 'a framework'} is installed. Run `pip install 'hpc_dl[mpi]'` "
        "(nothing to compile) or `hpc-dl horovod build`"
    )
