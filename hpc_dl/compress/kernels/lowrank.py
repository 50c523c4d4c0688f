"""Orthonormal directions, and products of two thin matrices.

Matrices are stored transposed, a direction in each row, so that loops run along memory. Sums
are taken in float64, where squares of float32 neither overflow nor underflow.
"""

from typing import Any

import numpy as np

from hpc_dl.compress.base import Floats
from hpc_dl.compress.kernels.compile import Kernel
from hpc_dl.compress.kernels.draw import hash_of
from hpc_dl.compress.random import hashed

LANES = 16
#: A direction that keeps no larger part of its norm depends on those before it.
DEPENDENT = 1e-6
_TRIES = 8
#: Columns of a row that stay in the nearest cache while the directions are added up.
_COLUMNS = 512


def _orthonormalise(rows: Any, key: int) -> None:
    rank, size = rows.shape
    lanes = np.empty(LANES, np.float64)
    whole = size // LANES * LANES
    for j in range(rank):
        row = rows[j]
        for attempt in range(_TRIES + 1):
            if attempt == _TRIES:  # more directions than dimensions
                row[:] = 0
                break
            if attempt:
                seed = np.uint32(key) + np.uint32(_TRIES * j + attempt)
                for i in range(size):
                    drawn = hash_of(seed, i) >> np.uint32(8)
                    row[i] = np.float32(np.int32(drawn) - np.int32(1 << 23))
            good = True
            # Make it a unit vector; then twice subtract the directions before, and make it a
            # unit vector again (twice is enough: Giraud et al., 2005).
            for turn in range(3):
                for k in range(j if turn == 0 else 0, j + 1):
                    other = rows[k]
                    lanes[:] = 0
                    for i in range(0, whole, LANES):
                        for lane in range(LANES):
                            lanes[lane] += np.float64(row[i + lane]) * np.float64(other[i + lane])
                    for i in range(whole, size):
                        lanes[i - whole] += np.float64(row[i]) * np.float64(other[i])
                    total = np.float64(0)
                    for lane in range(LANES):
                        total += lanes[lane]
                    if k < j:
                        part = np.float32(total)
                        for i in range(size):
                            row[i] -= part * other[i]
                    else:
                        norm = np.sqrt(total)
                        bound = DEPENDENT if turn == 1 else 0.0
                        if norm > bound and norm < np.inf:
                            inverse = 1.0 / norm
                            for i in range(size):
                                row[i] = np.float32(np.float64(row[i]) * inverse)
                        else:
                            good = False
                if not good:
                    break
            if good:
                break


def _dot(a: Floats, b: Floats) -> np.float64:
    padded = np.zeros(-(-len(a) // LANES) * LANES, np.float64)
    np.multiply(a, b, out=padded[: len(a)], dtype=np.float64)
    lanes = np.add.accumulate(padded.reshape(-1, LANES), axis=0)[-1]
    total: np.float64 = np.add.accumulate(lanes)[-1]
    return total


def _orthonormalised(rows: Floats, j: int) -> bool:
    row = rows[j]
    for turn in range(3):
        if turn:
            for k in range(j):
                row -= np.float32(_dot(row, rows[k])) * rows[k]
        norm = np.sqrt(_dot(row, row))
        if not (DEPENDENT if turn == 1 else 0.0) < norm < np.inf:
            return False
        row[:] = row.astype(np.float64) * (1.0 / norm)
    return True


def _orthonormalise_reference(rows: Floats, key: int) -> None:
    counters = np.arange(rows.shape[1], dtype=np.uint32)
    for j, row in enumerate(rows):
        attempt = 0
        while not _orthonormalised(rows, j):
            attempt += 1
            if attempt == _TRIES:
                row[:] = 0
                break
            drawn = hashed(key + _TRIES * j + attempt & 0xFFFFFFFF, counters) >> np.uint32(8)
            row[:] = drawn.astype(np.int32) - np.int32(1 << 23)


#: (rows, key): make the rows orthonormal, from the first to the last. One that is zero, not
#: finite or depends on those before it is replaced by a random one of this key.
orthonormalise = Kernel(_orthonormalise, _orthonormalise_reference)


def _multiply(p: Any, q: Any, x: Any, out: Any, left: Any, keep: bool) -> None:
    rank, height = p.shape
    width = q.shape[1]
    for i in range(height):
        for start in range(0, width, _COLUMNS):
            stop = min(start + _COLUMNS, width)
            row = out[i][start:stop]
            # Two directions at a time: fewer trips to the cache, the same order of sums.
            a, qa = p[0][i], q[0][start:stop]
            if rank == 1:
                for k in range(stop - start):
                    row[k] = a * qa[k]
            else:
                b, qb = p[1][i], q[1][start:stop]
                for k in range(stop - start):
                    row[k] = a * qa[k] + b * qb[k]
            for j in range(2, rank - 1, 2):
                a, qa, b, qb = p[j][i], q[j][start:stop], p[j + 1][i], q[j + 1][start:stop]
                for k in range(stop - start):
                    row[k] = row[k] + a * qa[k] + b * qb[k]
            if rank > 1 and rank % 2:
                a, qa = p[rank - 1][i], q[rank - 1][start:stop]
                for k in range(stop - start):
                    row[k] += a * qa[k]
            if keep:
                given, rest = x[i][start:stop], left[i][start:stop]
                for k in range(stop - start):
                    rest[k] = given[k] - row[k]


def _multiply_reference(
    p: Floats, q: Floats, x: Floats, out: Floats, left: Floats, keep: bool
) -> None:
    np.multiply(p[0][:, None], q[0], out=out)
    for column, row in zip(p[1:], q[1:], strict=True):
        out += column[:, None] * row
    if keep:
        np.subtract(x, out, out=left)


#: (p, q, x, out, left, keep): ``out`` becomes p transposed times q, and ``left``, where
#: ``keep``, what ``x`` has beside it.
multiply = Kernel(_multiply, _multiply_reference)
