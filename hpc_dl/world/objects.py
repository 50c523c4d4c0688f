"""Send Python objects between the ranks of a job.

The ranks of one job run the same program with the same rights, so pickle is as safe here as
the program itself; nothing pickled is ever stored or accepted from outside the job.
"""

import pickle
from typing import Any

import numpy as np

from hpc_dl.errors import OptionError
from hpc_dl.world.group import Call
from hpc_dl.world.process_sets import ProcessSet, global_process_set


def broadcast_object(
    obj: Any = None,
    root_rank: int = 0,
    name: str | None = None,
    process_set: ProcessSet = global_process_set,
) -> Any:
    """Return the object of rank ``root_rank`` on every rank.

    Args:
        obj: anything that pickles; only that of ``root_rank`` (a rank of the job) counts.
    """
    group = process_set.group()
    comm = group.comm
    root = root_in(process_set, root_rank)
    call = Call("broadcast", group.name("broadcast_object", name), (None,), "object", root=root)

    def transfer() -> Any:
        data = np.empty(0, np.uint8)
        if comm.rank == root:
            data = np.frombuffer(pickle.dumps(obj), np.uint8).copy()
        length = comm.broadcast(np.array([len(data)], np.int64), root)
        if comm.rank != root:
            data = np.empty(int(length[0]), np.uint8)
        comm.broadcast(data, root)
        return obj if comm.rank == root else pickle.loads(data.tobytes())

    return group.run(call, transfer)


def allgather_object(
    obj: Any, name: str | None = None, process_set: ProcessSet = global_process_set
) -> list[Any]:
    """Return the objects of all ranks, by rank; each is anything that pickles."""
    group = process_set.group()
    call = Call("allgather_object", group.name("allgather_object", name))
    data = np.frombuffer(pickle.dumps(obj), np.uint8)
    arrays = group.run(call, lambda: group.comm.allgather(data))
    return [pickle.loads(array.tobytes()) for array in arrays]


def root_in(process_set: ProcessSet, root_rank: int) -> int:
    """Translate a rank of the job into a rank of the set, as the communicator counts."""
    if process_set.process_set_id == 0:
        return root_rank
    if root_rank not in process_set.ranks:
        raise OptionError(
            f"root_rank {root_rank} is not in {process_set}; valid: {process_set.ranks}"
        )
    return process_set.ranks.index(root_rank)
