"""The largest coefficients of each chunk, and what is left of the chunk without them."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from hpc_dl.compress.base import Floats
from hpc_dl.compress.kernels.compile import Kernel

CHUNK = 64


def _pick(
    coefficients: Any, basis: Any, count: int, left: Any, keep: bool, indices: Any, values: Any
) -> int:
    found = 0
    width = basis.shape[0]  # A bound that is not constant: loops are not unrolled, but vectorised.
    ranks = np.empty(width, np.uint32)
    places = np.empty(width, np.int64)
    for start in range(0, len(coefficients), width):
        chunk = coefficients[start : start + width]
        bits = chunk.view(np.uint32)
        # A magnitude's bits but the last six, and the place: one integer, its own in a chunk.
        for j in range(width):
            ranks[j] = (bits[j] & np.uint32(0x7FFFFFC0)) | (np.uint32(63) - np.uint32(j))
        picked = 0
        for _ in range(count):
            top = np.uint32(0)
            for j in range(width):
                top = max(top, ranks[j])
            if top < np.uint32(CHUNK):
                break
            place = np.int64(63) - np.int64(top & np.uint32(63))
            ranks[place] = 0
            slot = picked
            while slot > 0 and places[slot - 1] > place:
                places[slot] = places[slot - 1]
                slot -= 1
            places[slot] = place
            picked += 1
        rest = left[start : start + width]
        for slot in range(picked):
            place = places[slot]
            value = chunk[place]
            indices[found] = start + place
            values[found] = value
            found += 1
            if keep:
                wave = basis[place]
                for j in range(width):
                    rest[j] -= value * wave[j]
    return found


def _pick_reference(
    coefficients: Floats,
    basis: Floats,
    count: int,
    left: Floats,
    keep: bool,
    indices: NDArray[np.int32],
    values: Floats,
) -> int:
    chunks, rest = coefficients.reshape(-1, CHUNK), left.reshape(-1, CHUNK)
    ranks = chunks.view(np.uint32) & np.uint32(0x7FFFFFC0)
    order = np.sort(np.argsort(~ranks, axis=1, kind="stable")[:, :count], axis=1)
    picked = np.take_along_axis(chunks, order, axis=1)
    sent = np.take_along_axis(ranks, order, axis=1) != 0
    starts = np.arange(0, len(coefficients), CHUNK)
    found = int(sent.sum())
    indices[:found] = (order + starts[:, None])[sent]
    values[:found] = picked[sent]
    if keep:
        for number in range(order.shape[1]):
            rows = sent[:, number]
            rest[rows] -= picked[rows, number, None] * basis[order[rows, number]]
    return found


#: (coefficients, basis, count, left, keep, indices, values) -> number found: pick the ``count``
#: largest coefficients of each whole chunk, but zeros, and where ``keep`` subtract their waves,
#: rows of the basis, from ``left``. Magnitudes that differ by less than 2**-17 count as equal.
pick = Kernel(_pick, _pick_reference)
