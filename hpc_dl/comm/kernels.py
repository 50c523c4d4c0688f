"""Combine buffers of several ranks, a cache-sized chunk at a time.

The sum is always taken in rank order and every rank gets the same bytes, so replicas stay
equal bit for bit. 16-bit floats are summed in float32 and rounded once.

Large float sums are taken in one compiled pass where numba is installed (``fused``); the
NumPy code here gives the same bits.
"""

import sys
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from hpc_dl.arrays import HALF_TYPES, host_view, torch_view
from hpc_dl.comm import fused
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


def _combine_exact(
    sources: Sequence[Array], targets: Sequence[Array], op: Op, scale: float, scratch: Array
) -> None:
    ufunc, total = _UFUNCS[op], sources[0]
    for source in sources[1:]:
        total = ufunc(total, source, out=scratch[: len(source)])
    factor = total.dtype.type(scale)
    if scale != 1.0 and len(sources) == 1:  # a target may be the source itself
        total, scale = np.multiply(total, factor, out=scratch[: len(total)]), 1.0
    for target in targets:
        if scale != 1.0:
            np.multiply(total, factor, out=target)
        elif target.ctypes.data != total.ctypes.data:
            np.copyto(target, total)


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
        total.mul_(float(np.float32(scale)))
    return host_view(total.to(tensors[0].dtype))


def _combine_half(
    sources: Sequence[Array], targets: Sequence[Array], op: Op, scale: float, scratch: Array
) -> None:
    total_of = _total_half_torch if "torch" in sys.modules else _total_half
    total = total_of(sources, op, scale)
    for target in targets:
        np.copyto(target, total)


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
        buffers: 1-D, one for each rank in rank order, of one type and length.
        op: SUM, MIN, MAX or PRODUCT.
        scale: a factor on the result.
        out: the buffers that get the result, instead of all.
    """
    if hi <= lo:
        return
    dtype, targets = buffers[0].dtype, buffers if out is None else out
    if op is Op.SUM and fused.sum_into(buffers, targets, lo, hi, scale):
        return
    half = dtype in HALF_TYPES
    combine_chunk = _combine_half if half else _combine_exact
    step = min(CHUNK_BYTES // dtype.itemsize, hi - lo)
    scratch = np.empty(0 if half else step, dtype)
    # What overflows is infinite on every rank alike; a warning, raised as an error on one,
    # would leave the others waiting.
    with np.errstate(all="ignore"):
        for start in range(lo, hi, step):
            stop = min(start + step, hi)
            chunks = [buffer[start:stop] for buffer in buffers]
            combine_chunk(chunks, [target[start:stop] for target in targets], op, scale, scratch)


def combine(parts: Sequence[Array], op: Op, scale: float = 1.0) -> Array:
    """Combine arrays of one shape, in their order, into a new array."""
    total = np.empty_like(parts[0])
    flat = [part.reshape(-1) for part in parts]
    reduce_in_place(flat, 0, total.size, op, scale, out=[total.reshape(-1)])
    return total


def scale_in_place(flat: Array, scale: float) -> None:
    """Multiply the 1-D ``flat`` by a factor, 16-bit floats in float32."""
    if scale != 1.0:
        reduce_in_place([flat], 0, len(flat), Op.SUM, scale)


def share(length: int, rank: int, size: int, align: int = 1) -> tuple[int, int]:
    """Return the bounds of the ``rank``-th of ``size`` nearly equal parts of ``length``.

    Inner bounds are multiples of ``align``; parts at the end may be empty.
    """
    blocks = -(-length // align)
    lo = (blocks * rank // size) * align
    hi = (blocks * (rank + 1) // size) * align
    return min(lo, length), min(hi, length)
