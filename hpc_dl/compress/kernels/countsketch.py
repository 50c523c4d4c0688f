"""Count sketch: each run of entries is added, with random signs, to a random place of each table.

Runs instead of single entries make the loops long and the memory accesses few; two entries
of different runs still meet with the probability of one in the table's width, since runs
begin anywhere in the table, which is a ring. Tables are longer than their ring by one run.
"""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from hpc_dl.compress.base import Array, Floats
from hpc_dl.compress.kernels.compile import Kernel
from hpc_dl.compress.kernels.draw import hash_of
from hpc_dl.compress.random import hashed

#: Tables of which the median is taken.
MEDIAN = 5

Words = NDArray[np.uint32]


def places(key: int, runs: Words, width: int) -> NDArray[np.int64]:
    """Return where runs begin in a table of this key."""
    return (hashed(key, runs).astype(np.uint64) * np.uint64(width) >> np.uint64(32)).astype(
        np.int64
    )


def signs(key: int, entries: Words, table: int) -> Floats:
    """Return 1 or -1 for each entry in a table."""
    bits = hashed(key, entries) >> np.uint32(table) & np.uint32(1)
    return np.asarray(1 - 2 * bits.astype(np.float32), np.float32)


def _encode(x: Any, starts: Any, key: int, run: int, tables: Any) -> None:
    size, bits = len(x), x.view(np.uint32)
    words, flipped = np.empty(run, np.uint32), np.empty(run, np.uint32)
    values = flipped.view(np.float32)
    for number in range(starts.shape[1]):
        begin = number * run
        count = min(run, size - begin)
        given = bits[begin : begin + count]
        for j in range(count):
            words[j] = hash_of(key, begin + j)
        for table in range(len(tables)):
            start = starts[table, number]
            part = tables[table][start : start + count]
            up = np.uint32(31) - np.uint32(table)
            for j in range(count):
                flipped[j] = given[j] ^ ((words[j] << up) & np.uint32(0x80000000))
            for j in range(count):
                part[j] += values[j]


def _encode_reference(
    x: Floats, starts: NDArray[np.int64], key: int, run: int, tables: Floats
) -> None:
    entries = np.arange(len(x), dtype=np.uint32)
    for table, memory in enumerate(tables):
        where = (starts[table][:, None] + np.arange(run)).reshape(-1)[: len(x)]
        np.add.at(memory, where, x * signs(key, entries, table))


#: (x, starts, key, run, tables): add each run of ``x``, at ``starts[table]``, to each table.
encode = Kernel(_encode, _encode_reference)


def _estimate(tables: Any, starts: Any, key: int, run: int, out: Any) -> None:
    size = len(out)
    words, flipped = np.empty(run, np.uint32), np.empty((MEDIAN, run), np.uint32)
    one, two, three = (
        flipped[0].view(np.float32),
        flipped[1].view(np.float32),
        flipped[2].view(np.float32),
    )
    four, five = flipped[3].view(np.float32), flipped[4].view(np.float32)
    for number in range(starts.shape[1]):
        begin = number * run
        count = min(run, size - begin)
        for j in range(count):
            words[j] = hash_of(key, begin + j)
        for table in range(MEDIAN):
            start = starts[table, number]
            part = tables[table][start : start + count].view(np.uint32)
            mine = flipped[table]
            up = np.uint32(31) - np.uint32(table)
            for j in range(count):
                mine[j] = part[j] ^ ((words[j] << up) & np.uint32(0x80000000))
        found = out[begin : begin + count]
        for j in range(count):
            a, b, c, d, e = one[j], two[j], three[j], four[j], five[j]
            low = max(min(a, b), min(c, d))
            high = min(max(a, b), max(c, d))
            found[j] = max(min(e, low), min(max(e, low), high))


def _estimate_reference(
    tables: Floats, starts: NDArray[np.int64], key: int, run: int, out: Floats
) -> None:
    entries = np.arange(len(out), dtype=np.uint32)
    each = [look_up(tables[t], starts[t], key, run, entries, t) for t in range(MEDIAN)]
    out[:] = np.median(each, axis=0)


#: (tables, starts, key, run, out): estimate all entries, by the median of the first tables.
estimate = Kernel(_estimate, _estimate_reference)


def look_up(
    memory: Floats, starts: NDArray[np.int64], key: int, run: int, entries: Array, table: int
) -> Floats:
    """Return one table's estimates of some entries."""
    found: Floats = memory[starts[entries // run] + entries % run]
    return found * signs(key, entries.astype(np.uint32), table)
