"""Random +-1 projections of blocks, and what sparse blocks they may be of.

A block of 1024 is multiplied by random signs and by a Hadamard matrix, and a random choice of
rows is kept: +-1 projections for ten additions an entry (Ailon and Chazelle, "Approximate
nearest neighbors and the fast Johnson-Lindenstrauss transform", STOC 2006). The transform is
taken of 32 by 32 entries, columns first, then rows, and leaves them transposed; so it is its
own transpose, and 1024 times its own inverse.
"""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from hpc_dl.compress.base import Floats
from hpc_dl.compress.kernels.compile import Kernel, called_by_loops
from hpc_dl.compress.kernels.draw import hash_of
from hpc_dl.compress.random import hashed

BLOCK = 1024
SIDE = 32
#: Bits of a magnitude by which entries are told apart: the exponent and 8 more.
_BITS = 16
#: Steps of conjugate gradients, at most, to fit the entries that were told.
SOLVER_STEPS = 8
#: Square of what is lacking, in squares of what was given, that counts as nothing.
SOLVED = 1e-12


def parities() -> Floats:
    """Return 1 for each number below 1024 with an even number of ones, -1 for the others."""
    found = np.ones(1, np.float32)
    while len(found) < BLOCK:
        found = np.concatenate((found, -found))
    return found


@called_by_loops
def _transform(a: Any, b: Any) -> None:
    """Transform ``a``, which is used up, to ``b``."""
    _butterflies(a)
    for i in range(SIDE):
        line = b[i * SIDE : i * SIDE + SIDE]
        for j in range(SIDE):
            line[j] = a[j * SIDE + i]
    _butterflies(b)


@called_by_loops
def _butterflies(a: Any) -> None:
    """Transform the columns of 32 by 32 entries."""
    half = BLOCK // 2
    while half >= SIDE:
        for base in range(0, BLOCK, 2 * half):
            low, high = a[base : base + half], a[base + half : base + 2 * half]
            for j in range(half):
                u, v = low[j], high[j]
                low[j] = u + v
                high[j] = u - v
        half //= 2


def _encode(x: Any, key: int, rows: Any, out: Any) -> None:
    size, kept = len(x), len(rows)
    a, b = np.empty(BLOCK, np.float32), np.empty(BLOCK, np.float32)
    for number in range(len(out) // kept):
        start = number * BLOCK
        count = min(BLOCK, size - start)
        given = x[start : start + count]
        for j in range(count):
            a[j] = -given[j] if hash_of(key, start + j) & np.uint32(1) else given[j]
        a[count:] = 0
        _transform(a, b)
        mine = out[number * kept : number * kept + kept]
        for j in range(kept):
            mine[j] = b[rows[j]]


def transform(blocks: Floats) -> Floats:
    """Return the transform of each row, of 1024."""
    a = blocks.reshape(-1, SIDE, SIDE)
    for _ in range(2):
        half = SIDE // 2
        while half:
            pairs = a.reshape(len(a), -1, 2, half, SIDE)
            a = np.stack((pairs[:, :, 0] + pairs[:, :, 1], pairs[:, :, 0] - pairs[:, :, 1]), 2)
            half //= 2
        a = a.reshape(-1, SIDE, SIDE).swapaxes(1, 2)
    # The second time was one too many: the result is left transposed.
    return np.ascontiguousarray(a.swapaxes(1, 2)).reshape(-1, BLOCK)


def signs(key: int, blocks: int) -> Floats:
    """Return 1 or -1 for each entry of each block."""
    bits = hashed(key, np.arange(blocks * BLOCK, dtype=np.uint32)) & np.uint32(1)
    return np.asarray(1 - 2 * bits.astype(np.float32), np.float32).reshape(-1, BLOCK)


def _encode_reference(x: Floats, key: int, rows: NDArray[np.int64], out: Floats) -> None:
    blocks = len(out) // len(rows)
    padded = np.zeros((blocks, BLOCK), np.float32)
    padded.reshape(-1)[: len(x)] = x * signs(key, blocks).reshape(-1)[: len(x)]
    out[:] = transform(padded)[:, rows].reshape(-1)


#: (x, key, rows, out): project each block of ``x`` to as many numbers as there are rows.
encode = Kernel(_encode, _encode_reference)


def _recover(
    y: Any,
    key: int,
    rows: Any,
    fitted: int,
    keep: int,
    steps: int,
    parity: Any,
    out: Any,
    sums: Any,
) -> None:
    size, kept = len(out), len(rows)
    a, b = np.empty(BLOCK, np.float32), np.empty(BLOCK, np.float32)
    sign, z, best = np.empty(BLOCK, np.float32), np.empty(BLOCK, np.float32), np.empty(BLOCK)
    magnitudes = np.empty(BLOCK, np.uint32)
    support = np.empty(keep, np.int64)
    columns, lines = np.empty((keep, kept)), np.empty((kept, keep))
    mine, rest, ahead = np.empty(kept), np.empty(kept), np.empty(kept)
    found, slope, way = np.empty(keep), np.empty(keep), np.empty(keep)
    share = np.float32(1) / np.float32(fitted)
    for number in range(len(y) // kept):
        start = number * BLOCK
        for j in range(BLOCK):
            odd = hash_of(key, start + j) & np.uint32(1)
            sign[j] = np.float32(1) - np.float32(2) * np.float32(odd)
        best[:] = 0
        least = 0.0
        for j in range(kept):
            mine[j] = y[number * kept + j]
            rest[j] = mine[j]
        for j in range(fitted):
            least += mine[j] * mine[j]
        done = SOLVED * least
        product, square = 0.0, 0.0
        for _ in range(steps):
            # Transform back what is lacking.
            a[:] = 0
            for j in range(fitted):
                a[rows[j]] = np.float32(rest[j])
            _transform(a, b)
            # Find the entries that are largest then, by halving: counting uses vectors.
            for j in range(BLOCK):
                z[j] = np.float32(best[j]) + sign[j] * b[j] * share
            bits = z.view(np.uint32)
            for j in range(BLOCK):
                magnitudes[j] = bits[j] & np.uint32(0x7FFFFFFF)
            bound = np.uint32(0)
            for bit in range(_BITS):
                trial = bound | np.uint32(1) << np.uint32(30 - bit)
                above = np.uint32(0)
                for j in range(BLOCK):
                    above = np.uint32(above + np.uint32(magnitudes[j] >= trial))
                if above >= keep:
                    bound = trial
            bound = max(bound, np.uint32(1))  # zeros are not looked for
            count = 0
            for j in range(BLOCK):
                if magnitudes[j] >= bound:
                    if count == keep:
                        break
                    support[count] = j
                    count += 1
            for t in range(count):
                place = support[t]
                turned = place % SIDE * SIDE + place // SIDE
                for j in range(kept):
                    entry = np.float64(sign[place] * parity[rows[j] & turned])
                    columns[t, j] = entry
                    lines[j, t] = entry
            # Least squares on these entries by conjugate gradients.
            found[:] = 0
            slope[:] = 0
            for j in range(kept):
                rest[j] = mine[j]
            for j in range(fitted):
                for t in range(count):
                    slope[t] += lines[j, t] * rest[j]
            way[:] = slope
            steep = 0.0
            for t in range(count):
                steep += slope[t] * slope[t]
            flat = SOLVED * steep
            for _again in range(SOLVER_STEPS):
                if not steep > flat:
                    break
                ahead[:] = 0
                for t in range(count):
                    column, pace = columns[t], way[t]
                    for j in range(kept):
                        ahead[j] += pace * column[j]
                length = 0.0
                for j in range(fitted):
                    length += ahead[j] * ahead[j]
                pace = steep / length
                for t in range(count):
                    found[t] += pace * way[t]
                for j in range(kept):
                    rest[j] -= pace * ahead[j]
                slope[:] = 0
                for j in range(fitted):
                    for t in range(count):
                        slope[t] += lines[j, t] * rest[j]
                before, steep = steep, 0.0
                for t in range(count):
                    steep += slope[t] * slope[t]
                for t in range(count):
                    way[t] = slope[t] + steep / before * way[t]
            norm = 0.0
            for j in range(fitted):
                norm += rest[j] * rest[j]
            if not norm < least:
                break
            least = norm
            best[:] = 0
            for t in range(count):
                best[support[t]] = found[t]
            product, square = 0.0, 0.0
            for j in range(fitted, kept):
                guess = mine[j] - rest[j]
                product += mine[j] * guess
                square += guess * guess
            if norm <= done:
                break
        for j in range(min(BLOCK, size - start)):
            out[start + j] = best[j]
        sums[0] += product
        sums[1] += square


def _recover_reference(
    y: Floats,
    key: int,
    rows: NDArray[np.int64],
    fitted: int,
    keep: int,
    steps: int,
    parity: Floats,
    out: Floats,
    sums: NDArray[np.float64],
) -> None:
    every = signs(key, len(y) // len(rows))
    for number, mine in enumerate(y.reshape(-1, len(rows)).astype(np.float64)):
        sign, best = every[number], np.zeros(BLOCK)
        rest, guess = mine.copy(), np.zeros_like(mine)
        least = float(rest[:fitted] @ rest[:fitted])
        done = SOLVED * least
        for _ in range(steps):
            back = np.zeros(BLOCK, np.float32)
            back[rows[:fitted]] = rest[:fitted]
            z = best.astype(np.float32) + sign * transform(back[None])[0] / np.float32(fitted)
            ranks = np.abs(z).view(np.uint32) >> np.uint32(31 - _BITS)
            bound = np.partition(ranks, BLOCK - keep)[BLOCK - keep]
            support = np.flatnonzero((ranks >= bound) & (z != 0))[:keep]
            turned = support % SIDE * SIDE + support // SIDE
            matrix = (sign[support] * parity[rows[:, None] & turned]).astype(np.float64)
            found = _least_squares(matrix[:fitted], mine[:fitted])
            rest = mine - matrix @ found
            norm = float(rest[:fitted] @ rest[:fitted])
            if not norm < least:
                break
            least, guess, best = norm, mine - rest, np.zeros(BLOCK)
            best[support] = found
            if norm <= done:
                break
        stop = min(len(out), (number + 1) * BLOCK)
        out[number * BLOCK : stop] = best[: stop - number * BLOCK]
        check = guess[fitted:]
        sums += check @ mine[fitted:], check @ check


def _least_squares(matrix: NDArray[np.float64], y: NDArray[np.float64]) -> NDArray[np.float64]:
    """Solve by as many steps of conjugate gradients as the loop takes."""
    found, rest = np.zeros(matrix.shape[1]), y.copy()
    slope = matrix.T @ rest
    way, steep = slope, slope @ slope
    flat = SOLVED * steep
    for _ in range(SOLVER_STEPS):
        if not steep > flat:
            break
        ahead = matrix @ way
        pace = steep / (ahead @ ahead)
        found, rest = found + pace * way, rest - pace * ahead
        slope = matrix.T @ rest
        before, steep = steep, slope @ slope
        way = slope + steep / before * way
    return found


#: (y, key, rows, fitted, keep, steps, parity, out, sums): guess blocks of ``keep`` entries from
#: their projections, of which the first ``fitted`` count, and the others check the guess:
#: ``sums`` grows by their products with those of the guess, and by the squares of the latter.
#: The reference finds the same but for rounding.
recover = Kernel(_recover, _recover_reference)
