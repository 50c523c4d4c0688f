"""Collectives on tensors of any framework, agreed between the ranks.

The adapters of torch and TensorFlow share these; they differ only in how their frameworks
differentiate and trace them.
"""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from hpc_dl.arrays import from_host, host_view, is_device_tensor
from hpc_dl.comm import Communicator, Op, Work
from hpc_dl.comm.protocol import Array
from hpc_dl.errors import OptionError
from hpc_dl.world.group import Call
from hpc_dl.world.objects import root_in
from hpc_dl.world.process_sets import ProcessSet

Average, Sum, Min, Max, Product, Adasum = (
    Op.AVERAGE,
    Op.SUM,
    Op.MIN,
    Op.MAX,
    Op.PRODUCT,
    Op.ADASUM,
)


class Handle:
    """A collective under way; ``synchronize`` returns its result, ``poll`` asks for it."""

    def __init__(self, work: Work, finish: Callable[[Any], Any]):
        self._work, self._finish = work, finish
        self._result: Any = None
        self._finished = False

    def done(self) -> bool:
        """Tell whether ``wait`` would return at once."""
        return self._finished or self._work.done()

    def wait(self) -> Any:
        """Block until it is complete and return its result, each time the same."""
        if not self._finished:
            self._result = self._finish(self._work.wait())
            self._finished = True
        return self._result


class HandleGroup:
    """Several collectives under way as one; its result is the list of theirs."""

    def __init__(self, handles: Sequence[Work]):
        self._handles = handles

    def done(self) -> bool:
        """Tell whether ``wait`` would return at once."""
        return all(handle.done() for handle in self._handles)

    def wait(self) -> list[Any]:
        """Block until all are complete."""
        return [handle.wait() for handle in self._handles]


def poll(handle: Handle) -> bool:
    """Tell whether an asynchronous collective is complete."""
    return handle.done()


def synchronize(handle: Handle) -> Any:
    """Wait for an asynchronous collective and return its result."""
    return handle.wait()


def resolve_op(op: Op | str | None, average: bool | None) -> Op:
    """Resolve Horovod's two ways to name the reduction; the default is Average."""
    if average is not None:
        if op is not None:
            raise OptionError(f"give op={op} or average={average}, not both; average is the older")
        return Op.AVERAGE if average else Op.SUM
    return Op.AVERAGE if op is None else Op(op)


def allreduce_start(
    x: Any, op: Op, scale: float, name: str | None, process_set: ProcessSet
) -> Work:
    """Start to combine ``x``, a host array or a CUDA tensor, in place."""
    group = process_set.group()
    comm, name = group.comm, group.name("allreduce", name)
    if comm.negotiates or comm.size == 1:
        return comm.allreduce_async(x, op, scale, name)
    call = Call("allreduce", name, tuple(x.shape), _dtype(x), op.value, scale)
    return group.start(call, lambda: _allreduce(comm, x, op, scale))


def allreduce_now(x: Any, op: Op, scale: float, name: str | None, process_set: ProcessSet) -> None:
    """Combine ``x``, a host array or a CUDA tensor, in place."""
    group = process_set.group()
    comm, name = group.comm, group.name("allreduce", name)
    if comm.negotiates or comm.size == 1:
        comm.allreduce(x, op, scale, name)
        return
    call = Call("allreduce", name, tuple(x.shape), _dtype(x), op.value, scale)
    group.run(call, lambda: _allreduce(comm, x, op, scale))


def _allreduce(comm: Communicator, x: Any, op: Op, scale: float) -> None:
    if is_device_tensor(x) or not comm.owns(x):
        comm.allreduce(x, op, scale)
        return
    # Memory of a bucket has a path of its own that all ranks must take together; the
    # caller's ranks may have passed different memory.
    copy = x.copy()
    comm.allreduce(copy, op, scale)
    np.copyto(x, copy)


def allgather_start(x: Any, name: str | None, process_set: ProcessSet) -> Handle:
    """Start to concatenate every rank's ``x`` along dimension 0, which may differ."""
    group = process_set.group()
    comm, array = group.comm, as_host(x, group.comm)
    if array.ndim == 0:
        raise OptionError("allgather concatenates along dimension 0; got a scalar. Reshape to (1,)")
    call = Call("allgather", group.name("allgather", name), (None, *array.shape[1:]), _dtype(array))
    work = group.start(call, lambda: comm.allgather(array))
    return Handle(work, lambda arrays: from_host(np.concatenate(arrays), x))


def broadcast_start(x: Any, root_rank: int, name: str | None, process_set: ProcessSet) -> Work:
    """Start to overwrite ``x``, a host array or a CUDA tensor, with that of ``root_rank``."""
    group = process_set.group()
    root, name = root_in(process_set, root_rank), group.name("broadcast", name)
    call = Call("broadcast", name, tuple(x.shape), _dtype(x), root=root)
    return group.start(call, lambda: group.comm.broadcast(x, root))


def alltoall_start(x: Any, splits: Any, name: str | None, process_set: ProcessSet) -> Handle:
    """Start to send parts of ``x`` along dimension 0 to the ranks.

    Args:
        splits: the number of rows for each rank; None: equal parts.

    Returns:
        A handle on (what came, concatenated by source rank; the int32 rows from each rank).
    """
    group = process_set.group()
    comm, array = group.comm, as_host(x, group.comm)
    if array.ndim == 0:
        raise OptionError("alltoall cuts dimension 0 into parts; got a scalar. Reshape to (1,)")
    rows = _splits(array, splits, comm.size)
    parts = np.split(array, np.cumsum(rows)[:-1])
    call = Call("alltoall", group.name("alltoall", name), (None, *array.shape[1:]), _dtype(array))
    work = group.start(call, lambda: comm.alltoall(parts))

    def finish(received: list[Array]) -> tuple[Any, Any]:
        counts = np.array([len(part) for part in received], np.int32)
        return from_host(np.concatenate(received), x), from_host(counts, x)

    return Handle(work, finish)


def _splits(array: Array, splits: Any, size: int) -> Array:
    if splits is None:
        if len(array) % size:
            raise OptionError(
                f"alltoall without splits needs a length that {size} ranks divide; got "
                f"{len(array)}. Pass splits=[rows for each rank]"
            )
        return np.full(size, len(array) // size)
    rows = np.asarray(host_view(splits)).astype(np.int64).reshape(-1)
    if len(rows) != size or rows.sum() != len(array) or (rows < 0).any():
        raise OptionError(
            f"alltoall splits={rows.tolist()}: give {size} numbers of rows, 0 or more, whose sum "
            f"is the length {len(array)}"
        )
    return rows


def reducescatter_start(
    x: Any, op: Op, scale: float, name: str | None, process_set: ProcessSet
) -> Handle:
    """Start to combine ``x`` over the ranks, each keeping its part along dimension 0."""
    group = process_set.group()
    comm, array = group.comm, as_host(x, group.comm)
    if array.ndim == 0:
        raise OptionError("reducescatter cuts dimension 0 into parts; got a scalar")
    name = group.name("reducescatter", name)
    call = Call("reducescatter", name, tuple(array.shape), _dtype(array), op.value, scale)
    work = group.start(call, lambda: comm.reduce_scatter(array, op, scale))
    return Handle(work, lambda part: from_host(part, x))


def barrier(process_set: ProcessSet) -> None:
    """Wait until all ranks of the set have called it."""
    group = process_set.group()
    group.run(Call("barrier", group.name("barrier", None)), group.comm.barrier)


def pack(arrays: Sequence[Array]) -> dict[Any, Array]:
    """Concatenate arrays into one flat array for each type."""
    types = dict.fromkeys(array.dtype for array in arrays)
    return {
        dtype: np.concatenate([a.reshape(-1) for a in arrays if a.dtype == dtype])
        for dtype in types
    }


def unpack(flats: dict[Any, Array], arrays: Sequence[Array]) -> list[Array]:
    """Cut what ``pack`` made of ``arrays`` into arrays of their shapes again."""
    position = dict.fromkeys(flats, 0)
    out = []
    for array in arrays:
        start = position[array.dtype]
        position[array.dtype] = start + array.size
        out.append(flats[array.dtype][start : start + array.size].reshape(array.shape))
    return out


def as_host(x: Any, comm: Communicator) -> Array:
    """Return ``x`` as a host array; a CUDA tensor is copied where the communicator allows it."""
    if is_device_tensor(x):
        comm.check_device(x)
        return host_view(x.detach().cpu())
    return host_view(x)


def _dtype(x: Any) -> str:
    return str(x.dtype) if is_device_tensor(x) else str(x.dtype.name)
