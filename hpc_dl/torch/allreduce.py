"""All-reduce of torch tensors, with Horovod's names."""

from collections.abc import Sequence
from typing import Any

import torch

from hpc_dl.comm import Op
from hpc_dl.torch.autograd import Allreduce, apply
from hpc_dl.torch.compression import Compression, resolve
from hpc_dl.torch.memory import fresh_copy, memory_of, summed
from hpc_dl.world import Handle, ProcessSet, global_process_set
from hpc_dl.world import collectives as shared
from hpc_dl.world.collectives import HandleGroup, resolve_op

Tensor = torch.Tensor


def _start(
    tensor: Tensor, out: Tensor, op: Op, scale: float, name: str | None, process_set: ProcessSet
) -> Handle:
    """All-reduce ``out``, which holds ``tensor``'s values, and hand it out at the end."""
    memory, dense = memory_of(out)
    op, divisor = summed(tensor, op, process_set)
    work = shared.allreduce_start(memory, op, scale, name, process_set)

    def finish(_: Any) -> Tensor:
        if dense.data_ptr() != out.data_ptr():
            out.detach().copy_(dense)
        if divisor > 1:
            out.div_(divisor, rounding_mode="trunc")
        return out

    return Handle(work, finish)


def allreduce_async(
    tensor: Tensor,
    average: bool | None = None,
    name: str | None = None,
    op: Op | None = None,
    prescale_factor: float = 1.0,
    postscale_factor: float = 1.0,
    process_set: ProcessSet = global_process_set,
) -> Handle:
    """Start ``allreduce``; ``synchronize`` the handle for a new tensor."""
    out = fresh_copy(tensor)
    scale = prescale_factor * postscale_factor
    return _start(tensor, out, resolve_op(op, average), scale, name, process_set)


def allreduce_async_(
    tensor: Tensor,
    average: bool | None = None,
    name: str | None = None,
    op: Op | None = None,
    prescale_factor: float = 1.0,
    postscale_factor: float = 1.0,
    process_set: ProcessSet = global_process_set,
) -> Handle:
    """Start ``allreduce_``; the tensor holds the result after ``synchronize``."""
    scale = prescale_factor * postscale_factor
    return _start(tensor, tensor, resolve_op(op, average), scale, name, process_set)


def allreduce(
    tensor: Tensor,
    average: bool | None = None,
    name: str | None = None,
    compression: Any = Compression.none,
    op: Op | None = None,
    prescale_factor: float = 1.0,
    postscale_factor: float = 1.0,
    process_set: ProcessSet = global_process_set,
) -> Tensor:
    """Combine a tensor over the ranks into a new one; differentiable.

    Args:
        tensor: the same shape and type on all ranks.
        op: Average (the default), Sum, Min, Max, Product, or Adasum over Horovod.
        prescale_factor: and ``postscale_factor``: factors on the result of Sum and Average.
    """
    compressor = resolve(compression)
    sent, context = compressor.compress(tensor)
    scale = prescale_factor * postscale_factor
    reduced = apply(Allreduce, sent, resolve_op(op, average), scale, name, process_set)
    result: Tensor = compressor.decompress(reduced, context)
    return result


def allreduce_(
    tensor: Tensor,
    average: bool | None = None,
    name: str | None = None,
    op: Op | None = None,
    prescale_factor: float = 1.0,
    postscale_factor: float = 1.0,
    process_set: ProcessSet = global_process_set,
) -> Tensor:
    """Combine a tensor over the ranks in place, and return it."""
    handle = allreduce_async_(
        tensor, average, name, op, prescale_factor, postscale_factor, process_set
    )
    result: Tensor = handle.wait()
    return result


def _grouped_start(
    tensors: Sequence[Tensor],
    outs: Sequence[Tensor],
    op: Op,
    scale: float,
    name: str | None,
    process_set: ProcessSet,
) -> Handle:
    """All-reduce tensors as one flat tensor for each type and device."""
    kinds = dict.fromkeys((t.dtype, t.device) for t in tensors)
    handles = []
    for number, kind in enumerate(kinds):
        members = [(t, out) for t, out in zip(tensors, outs, strict=True) if _kind(t) == kind]
        flat = torch.cat([t.detach().reshape(-1) for t, _ in members])
        label = None if name is None else f"{name}.{number}"
        handles.append((_start(flat, flat, op, scale, label, process_set), members))

    def finish(flats: list[Tensor]) -> list[Tensor]:
        for flat, (_, members) in zip(flats, handles, strict=True):
            parts = flat.split([t.numel() for t, _ in members])
            for part, (_, out) in zip(parts, members, strict=True):
                out.detach().copy_(part.view(out.shape))
        return list(outs)

    return Handle(HandleGroup([handle for handle, _ in handles]), finish)


def _kind(tensor: Tensor) -> tuple[torch.dtype, torch.device]:
    return tensor.dtype, tensor.device


def grouped_allreduce_async(
    tensors: Sequence[Tensor],
    average: bool | None = None,
    name: str | None = None,
    op: Op | None = None,
    prescale_factor: float = 1.0,
    postscale_factor: float = 1.0,
    process_set: ProcessSet = global_process_set,
) -> Handle:
    """Start ``grouped_allreduce``; ``synchronize`` the handle for a list of new tensors."""
    outs = [torch.empty_like(t.detach()) for t in tensors]
    scale = prescale_factor * postscale_factor
    return _grouped_start(tensors, outs, resolve_op(op, average), scale, name, process_set)


def grouped_allreduce_async_(
    tensors: Sequence[Tensor],
    average: bool | None = None,
    name: str | None = None,
    op: Op | None = None,
    prescale_factor: float = 1.0,
    postscale_factor: float = 1.0,
    process_set: ProcessSet = global_process_set,
) -> Handle:
    """Start ``grouped_allreduce_``; the tensors hold the results after ``synchronize``."""
    scale = prescale_factor * postscale_factor
    return _grouped_start(tensors, tensors, resolve_op(op, average), scale, name, process_set)


def grouped_allreduce_(
    tensors: Sequence[Tensor],
    average: bool | None = None,
    name: str | None = None,
    op: Op | None = None,
    prescale_factor: float = 1.0,
    postscale_factor: float = 1.0,
    process_set: ProcessSet = global_process_set,
) -> list[Tensor]:
    """Combine tensors over the ranks in place, in one transfer, and return them."""
    handle = grouped_allreduce_async_(
        tensors, average, name, op, prescale_factor, postscale_factor, process_set
    )
    result: list[Tensor] = handle.wait()
    return result


def grouped_allreduce(
    tensors: Sequence[Tensor],
    average: bool | None = None,
    name: str | None = None,
    compression: Any = Compression.none,
    op: Op | None = None,
    prescale_factor: float = 1.0,
    postscale_factor: float = 1.0,
    process_set: ProcessSet = global_process_set,
) -> list[Tensor]:
    """Combine tensors over the ranks in one transfer for each type; differentiable."""
    results: dict[int, Tensor] = {}
    for number, kind in enumerate(dict.fromkeys(_kind(t) for t in tensors)):
        members = [(i, t) for i, t in enumerate(tensors) if _kind(t) == kind]
        reduced = allreduce(
            torch.cat([t.reshape(-1) for _, t in members]),
            average,
            None if name is None else f"{name}.{number}",
            compression,
            op,
            prescale_factor,
            postscale_factor,
            process_set,
        )
        parts = reduced.split([t.numel() for _, t in members])
        for part, (i, t) in zip(parts, members, strict=True):
            results[i] = part.view(t.shape)
    return [results[i] for i in range(len(tensors))]
