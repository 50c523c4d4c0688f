"""Combine buffers of several ranks, a cache-sized chunk at a time.

The sum is always taken in rank order and every rank gets the same bytes, so replicas stay
equal bit for bit. 16-bit floats are summed in float32 and rounded once.
"""

import sys
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from hpc_dl.arrays import HALF_TYPES, host_view, torch_view
from hpc_dl.comm.protocol import Array, Op

#: Bytes of each buffer that are worked on at a time; with a few ranks this stays in the
#: second-level cache, so each byte crosses the memory bus once in each direction.
CHUNK_BYTES = 128 * 1024

_UFUNCS: dict[Op, Callable[..., Any]] = {
    Op.SUM: np.add,
    Op.MIN: np.minimum,
    Op.MAX: np.maximum,
    Op.PRODUCT: np.multiply,
}


def _total_exact(chunks: Sequence[Array], op: Op, scale: float) -> Array:
    total, ufunc = chunks[0], _UFUNCS[op]
    for chunk in chunks[1:]:
        ufunc(total, chunk, out=total)
    if scale != 1.0:
        np.multiply(total, total.dtype.type(scale), out=total)
    return total


def _total_half(chunks: Sequence[Array], op: Op, scale: float) -> Array:
    total, ufunc = chunks[0].astype(np.float32), _UFUNCS[op]
    for chunk in chunks[1:]:
        ufunc(total, chunk.astype(np.float32), out=total)
    if scale != 1.0:
        np.multiply(total, np.float32(scale), out=total)
    return total.astype(chunks[0].dtype)


def _total_half_torch(chunks: Sequence[Array], op: Op, scale: float) -> Array:
    """Do what ``_total_half`` does with torch's vectorised conversions, to the same bits."""
    torch = sys.modules["torch"]
    function = getattr(torch, {Op.SUM: "add", Op.PRODUCT: "mul"}.get(op, op.value + "imum"))
    tensors = [torch_view(chunk) for chunk in chunks]
    total = tensors[0].float()
    for tensor in tensors[1:]:
        function(total, tensor.float(), out=total)
    if scale != 1.0:
        total.mul_(scale)
    return host_view(total.to(tensors[0].dtype))


def reduce_in_place(
    buffers: Sequence[Array],
    lo: int,
    hi: int,
    op: Op,
    scale: float = 1.0,
    out: Sequence[Array] | None = None,
) -> None:
    """Combine elements ``lo:hi`` over all buffers and write them to every buffer.

    Args:
        buffers: 1-D, one for each rank in rank order, of one type and length. The first
            may be overwritten in any case.
        op: SUM, MIN, MAX or PRODUCT.
        scale: a factor on the result.
        out: the buffers that get the result, instead of all.
    """
    dtype = buffers[0].dtype
    total_of: Callable[[Sequence[Array], Op, float], Array] = _total_exact
    if dtype in HALF_TYPES:
        total_of = _total_half_torch if "torch" in sys.modules else _total_half
    step = CHUNK_BYTES // dtype.itemsize
    targets = buffers if out is None else out
    for start in range(lo, hi, step):
        stop = min(start + step, hi)
        total = total_of([buffer[start:stop] for buffer in buffers], op, scale)
        for target in targets:
            chunk = target[start:stop]
            if chunk.ctypes.data != total.ctypes.data:
                np.copyto(chunk, total)


def combine(parts: Sequence[Array], op: Op, scale: float = 1.0) -> Array:
    """Combine arrays of one shape, in their order, into a new array."""
    total = parts[0].copy()
    flat = [total.reshape(-1), *(part.reshape(-1) for part in parts[1:])]
    reduce_in_place(flat, 0, total.size, op, scale, out=flat[:1])
    return total


def share(length: int, rank: int, size: int, align: int = 1) -> tuple[int, int]:
    """Return the bounds of the ``rank``-th of ``size`` nearly equal parts of ``length``.

    Inner bounds are multiples of ``align``; parts at the end may be empty.
    """
    blocks = -(-length // align)
    lo = (blocks * rank // size) * align
    hi = (blocks * (rank + 1) // size) * align
    return min(lo, length), min(hi, length)
