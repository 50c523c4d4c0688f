"""What each rank of ``hpc-dl doctor``'s check runs: one all-reduce, and a line of JSON on it.

Run as ``hpc-dl launch -n 2 -m hpc_dl.cli.allreduce_check COMM [FRAMEWORK]``.
"""

import json
import sys

import numpy as np

from hpc_dl.comm import make
from hpc_dl.errors import LaunchError

#: Elements in the array: large enough for several chunks, small enough for any /dev/shm.
_ELEMENTS = 100_003

_THREAD_LEVELS = ("single", "funneled", "serialized", "multiple")


def main(spec: str, framework: str | None) -> None:
    """Sum an array over all ranks with one communicator and check each element."""
    if framework is not None:
        __import__(framework)  # the choice depends on whether it sees GPUs
    communicator, choice = make(spec, framework)
    size, rank = communicator.size, communicator.rank
    data = np.arange(_ELEMENTS, dtype=np.float64) + rank
    communicator.allreduce(data)
    expected = np.arange(_ELEMENTS, dtype=np.float64) * size + size * (size - 1) / 2
    if not np.array_equal(data, expected):
        wrong = int(np.flatnonzero(data != expected)[0])
        raise LaunchError(
            f"the all-reduce over {communicator.name} gave {data[wrong]} instead of "
            f"{expected[wrong]} in element {wrong} on rank {rank}"
        )
    if rank == 0:
        report = {
            "communicator": communicator.name,
            "reason": choice.reason,
            "size": size,
            "built": _horovod_parts(),
            "thread_level": _thread_level(),
        }
        print("report " + json.dumps(report), flush=True)
    communicator.barrier()


def _horovod_parts() -> list[str]:
    """Return what the Horovod in use was built with; nothing if none is in use."""
    for name in ("horovod.torch", "horovod.tensorflow"):
        horovod = sys.modules.get(name)
        if horovod is not None:
            parts = ("mpi", "gloo", "nccl", "cuda", "rocm")
            return [part for part in parts if getattr(horovod, f"{part}_built")()]
    return []


def _thread_level() -> str | None:
    mpi = sys.modules.get("mpi4py.MPI")
    if mpi is None or not mpi.Is_initialized():
        return None
    return _THREAD_LEVELS[mpi.Query_thread()]


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2] if len(sys.argv) > 2 else None)
