"""The collectives other than all-reduce on torch tensors, with Horovod's names."""

from collections.abc import Sequence
from typing import Any

import torch

from hpc_dl.comm import Op
from hpc_dl.torch.autograd import Allgather, Alltoall, Broadcast, Reducescatter, apply
from hpc_dl.torch.compression import Compression, resolve
from hpc_dl.torch.memory import fresh_copy, memory_of
from hpc_dl.world import Handle, ProcessSet, global_process_set
from hpc_dl.world import collectives as shared
from hpc_dl.world.collectives import HandleGroup, resolve_op

Tensor = torch.Tensor


def allgather_async(
    tensor: Tensor, name: str | None = None, process_set: ProcessSet = global_process_set
) -> Handle:
    """Start ``allgather``; ``synchronize`` the handle for a new tensor."""
    return shared.allgather_start(tensor.detach(), name, process_set)


def allgather(
    tensor: Tensor, name: str | None = None, process_set: ProcessSet = global_process_set
) -> Tensor:
    """Concatenate the ranks' tensors along dimension 0, which may differ; differentiable."""
    result: Tensor = apply(Allgather, tensor, name, process_set)
    return result


def grouped_allgather_async(
    tensors: Sequence[Tensor],
    name: str | None = None,
    process_set: ProcessSet = global_process_set,
) -> Handle:
    """Start ``grouped_allgather``."""
    handles = [
        allgather_async(t, None if name is None else f"{name}.{i}", process_set)
        for i, t in enumerate(tensors)
    ]
    return Handle(HandleGroup(handles), lambda results: results)


def grouped_allgather(
    tensors: Sequence[Tensor],
    name: str | None = None,
    process_set: ProcessSet = global_process_set,
) -> list[Tensor]:
    """``allgather`` each of several tensors; differentiable."""
    return [
        allgather(t, None if name is None else f"{name}.{i}", process_set)
        for i, t in enumerate(tensors)
    ]


def broadcast_async_(
    tensor: Tensor,
    root_rank: int,
    name: str | None = None,
    process_set: ProcessSet = global_process_set,
) -> Handle:
    """Start ``broadcast_``; the tensor holds the result after ``synchronize``."""
    memory, dense = memory_of(tensor)
    work = shared.broadcast_start(memory, root_rank, name, process_set)

    def finish(_: Any) -> Tensor:
        if dense.data_ptr() != tensor.data_ptr():
            tensor.detach().copy_(dense)
        return tensor

    return Handle(work, finish)


def broadcast_async(
    tensor: Tensor,
    root_rank: int,
    name: str | None = None,
    process_set: ProcessSet = global_process_set,
) -> Handle:
    """Start ``broadcast``; ``synchronize`` the handle for a new tensor."""
    return broadcast_async_(fresh_copy(tensor), root_rank, name, process_set)


def broadcast_(
    tensor: Tensor,
    root_rank: int,
    name: str | None = None,
    process_set: ProcessSet = global_process_set,
) -> Tensor:
    """Overwrite a tensor with that of rank ``root_rank``, and return it."""
    result: Tensor = broadcast_async_(tensor, root_rank, name, process_set).wait()
    return result


def broadcast(
    tensor: Tensor,
    root_rank: int,
    name: str | None = None,
    process_set: ProcessSet = global_process_set,
) -> Tensor:
    """Return the tensor of rank ``root_rank``; differentiable."""
    result: Tensor = apply(Broadcast, tensor, root_rank, name, process_set)
    return result


def alltoall_async(
    tensor: Tensor,
    splits: Any = None,
    name: str | None = None,
    process_set: ProcessSet = global_process_set,
) -> Handle:
    """Start ``alltoall``; ``synchronize`` gives what it returns."""
    handle = shared.alltoall_start(tensor.detach(), splits, name, process_set)
    if splits is not None:
        return handle
    return Handle(handle, lambda result: result[0])


def alltoall(
    tensor: Tensor,
    splits: Any = None,
    name: str | None = None,
    process_set: ProcessSet = global_process_set,
) -> Any:
    """Send parts of a tensor along dimension 0 to the ranks; differentiable.

    Args:
        splits: rows for each rank; None: equal parts.

    Returns:
        What came, concatenated by source rank; with ``splits`` also the int32 rows received
        from each rank.
    """
    output, received = apply(Alltoall, tensor, splits, name, process_set)
    return output if splits is None else (output, received)


def reducescatter_async(
    tensor: Tensor,
    name: str | None = None,
    op: Op = Op.AVERAGE,
    process_set: ProcessSet = global_process_set,
    prescale_factor: float = 1.0,
    postscale_factor: float = 1.0,
) -> Handle:
    """Start ``reducescatter``; ``synchronize`` the handle for a new tensor."""
    scale = prescale_factor * postscale_factor
    return shared.reducescatter_start(
        tensor.detach(), resolve_op(op, None), scale, name, process_set
    )


def reducescatter(
    tensor: Tensor,
    name: str | None = None,
    compression: Any = Compression.none,
    op: Op = Op.AVERAGE,
    process_set: ProcessSet = global_process_set,
    prescale_factor: float = 1.0,
    postscale_factor: float = 1.0,
) -> Tensor:
    """Combine a tensor over the ranks, each keeping its part of dimension 0; differentiable."""
    compressor = resolve(compression)
    sent, context = compressor.compress(tensor)
    scale = prescale_factor * postscale_factor
    reduced = apply(Reducescatter, sent, resolve_op(op, None), scale, name, process_set)
    result: Tensor = compressor.decompress(reduced, context)
    return result


def grouped_reducescatter_async(
    tensors: Sequence[Tensor],
    name: str | None = None,
    op: Op = Op.AVERAGE,
    process_set: ProcessSet = global_process_set,
    prescale_factor: float = 1.0,
    postscale_factor: float = 1.0,
) -> Handle:
    """Start ``grouped_reducescatter``."""
    handles = [
        reducescatter_async(
            t,
            None if name is None else f"{name}.{i}",
            op,
            process_set,
            prescale_factor,
            postscale_factor,
        )
        for i, t in enumerate(tensors)
    ]
    return Handle(HandleGroup(handles), lambda results: results)


def grouped_reducescatter(
    tensors: Sequence[Tensor],
    name: str | None = None,
    compression: Any = Compression.none,
    op: Op = Op.AVERAGE,
    process_set: ProcessSet = global_process_set,
    prescale_factor: float = 1.0,
    postscale_factor: float = 1.0,
) -> list[Tensor]:
    """``reducescatter`` each of several tensors; differentiable."""
    return [
        reducescatter(
            t,
            None if name is None else f"{name}.{i}",
            compression,
            op,
            process_set,
            prescale_factor,
            postscale_factor,
        )
        for i, t in enumerate(tensors)
    ]


def barrier(process_set: ProcessSet = global_process_set) -> None:
    """Wait until all ranks have called it."""
    shared.barrier(process_set)


def join(device: int = -1) -> int:
    """Say that this rank has no more batches, and serve the others with zeros until they end.

    Averages go on to be taken over all ranks, as in Horovod: the joined ones count as zero.

    Args:
        device: accepted for Horovod's sake.

    Returns:
        The rank that joined last.
    """
    return global_process_set.group().join()
