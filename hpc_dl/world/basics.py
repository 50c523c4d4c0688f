"""Ranks, sizes and builds: the part of Horovod's interface that needs no tensors."""

from collections.abc import Sequence
from importlib.util import find_spec
from typing import Any

from hpc_dl.comm.choose import installed_horovod
from hpc_dl.world import process_sets as registry
from hpc_dl.world import state
from hpc_dl.world.process_sets import ProcessSet
from hpc_dl.world.state import current, is_initialized


def init_framework(
    comm: Any = None,
    process_sets: Sequence[ProcessSet | Sequence[int]] | str | None = None,
    framework: str | None = None,
) -> None:
    """Start; the adapters' ``init`` with the framework filled in."""
    world = state.start(comm, framework)
    registry.start(world, process_sets)


def shutdown() -> None:
    """End: finish what is pending and free what was allocated. All ranks call it."""
    if is_initialized():
        registry.forget_all(current())
    state.shutdown()


def rank() -> int:
    """Return the number of this rank, from 0."""
    return current().comm.rank


def size() -> int:
    """Return the number of ranks."""
    return current().comm.size


def local_rank() -> int:
    """Return the number of this rank on its node."""
    return current().comm.local_rank


def local_size() -> int:
    """Return the number of ranks on this node."""
    return current().comm.local_size


def cross_rank() -> int:
    """Return the number of this node among those that have a rank with this local rank."""
    return current().comm.cross_rank


def cross_size() -> int:
    """Return the number of nodes that have a rank with this local rank."""
    return current().comm.cross_size


def is_homogeneous() -> bool:
    """Tell whether all nodes have the same number of ranks."""
    return current().comm.homogeneous


def _is(communicator: str) -> bool:
    return is_initialized() and current().comm.name == communicator


def _horovod_says(query: str) -> bool:
    """Ask the running Horovod; without one the answer is no."""
    if not _is("horovod"):
        return False
    return bool(getattr(current().comm.hvd, query)())  # type: ignore[attr-defined]


def mpi_built() -> bool:
    """Tell whether ranks can talk over MPI: mpi4py, or a Horovod with MPI, is installed."""
    return find_spec("mpi4py") is not None or installed_horovod() is not None


def mpi_enabled() -> bool:
    """Tell whether the ranks talk over MPI in this run."""
    return _is("mpi") or _horovod_says("mpi_enabled")


def mpi_threads_supported() -> bool:
    """Tell whether MPI may be called from several threads, which overlap needs."""
    if _is("mpi"):
        from mpi4py import MPI

        return bool(MPI.Query_thread() == MPI.THREAD_MULTIPLE)
    return _horovod_says("mpi_threads_supported")


def gloo_built() -> bool:
    """Tell whether the running Horovod is built with Gloo."""
    return _horovod_says("gloo_built")


def gloo_enabled() -> bool:
    """Tell whether the running Horovod uses Gloo."""
    return _horovod_says("gloo_enabled")


def nccl_built() -> bool:
    """Tell whether the installed Horovod is built with NCCL."""
    found = installed_horovod()
    return found is not None and found.nccl


def ddl_built() -> bool:
    """Tell whether the running Horovod is built with IBM's DDL."""
    return _horovod_says("ddl_built")


def ccl_built() -> bool:
    """Tell whether the running Horovod is built with Intel's oneCCL."""
    return _horovod_says("ccl_built")


def cuda_built() -> bool:
    """Tell whether the running Horovod is built with CUDA."""
    return _horovod_says("cuda_built")


def rocm_built() -> bool:
    """Tell whether the running Horovod is built with ROCm."""
    return _horovod_says("rocm_built")
