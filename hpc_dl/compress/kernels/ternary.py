"""Minus one, zero or one at random, in lanes of a few bits that are summed without carry.

What is stored is the value plus one, so that sums over ranks stay positive.
"""

from typing import Any

import numpy as np

from hpc_dl.compress.base import Array, Floats
from hpc_dl.compress.kernels.compile import Kernel
from hpc_dl.compress.kernels.draw import uniform_of
from hpc_dl.compress.random import uniform

#: Values whose lanes are packed together: a word holds values that are ``part`` apart.
BLOCK = 1024
LANES = 8

#: The inverse of a smaller scale may overflow; it stands for zero.
_TINY = np.float32(1e-37)
_ONE, _NOTHING = np.float32(1), np.float32(0)


def _look(x: Any, found: Any) -> None:
    size = len(x)
    lanes = np.zeros(LANES, np.float64)
    bits = x.view(np.int32)
    top = np.int32(0)
    for i in range(size):
        top = max(top, np.int32(bits[i] & np.int32(0x7FFFFFFF)))
    whole = size // LANES * LANES
    for i in range(0, whole, LANES):
        for lane in range(LANES):
            wide = np.float64(x[i + lane])
            lanes[lane] += wide * wide
    for i in range(whole, size):
        wide = np.float64(x[i])
        lanes[i - whole] += wide * wide
    total = 0.0
    for lane in range(LANES):
        total += lanes[lane]
    word = np.full(1, top, np.int32)
    found[0] = np.float64(word.view(np.float32)[0])
    found[1] = total


def _look_reference(x: Floats, found: Array) -> None:
    padded = np.zeros(-(-len(x) // LANES) * LANES)
    padded[: len(x)] = x
    squares = np.add.accumulate((padded * padded).reshape(-1, LANES))[-1]
    found[:] = np.abs(x).max(), np.add.accumulate(squares)[-1]


def _encode(
    x: Any, left: Any, keep: bool, scale: Any, bits: int, first: int, key: Any, packed: Any
) -> None:
    size, per = len(x), max(1, 8 // bits)
    inverse = _ONE / scale if scale > _TINY else _NOTHING
    draws = np.zeros(BLOCK, np.float32)
    coded = np.zeros(BLOCK, np.uint8)
    for start in range(0, size, BLOCK):
        count = min(BLOCK, size - start)
        values = x[start : start + count]
        for i in range(count):
            draws[i] = uniform_of(key, first + start + i)
        for i in range(count):
            v = values[i] * inverse
            coded[i] = np.uint8(1) + np.uint8(draws[i] < v) - np.uint8(draws[i] < -v)
        if keep:
            rest = left[start : start + count]
            for i in range(count):
                rest[i] = values[i] - scale * (np.float32(coded[i]) - _ONE)
        part = (count + per - 1) // per
        for i in range(count, part * per):
            coded[i] = np.uint8(1)
        words = packed[start // per : start // per + part]
        for i in range(part):
            words[i] = coded[i]
        for k in range(1, per):
            piece = coded[k * part : (k + 1) * part]
            factor = np.uint8(1 << (k * bits))
            for i in range(part):
                words[i] = words[i] | np.uint8(piece[i] * factor)


def _encode_reference(
    x: Floats,
    left: Floats,
    keep: bool,
    scale: np.float32,
    bits: int,
    first: int,
    key: np.uint32,
    packed: Array,
) -> None:
    per = max(1, 8 // bits)
    shifts = (np.arange(per) * bits).astype(packed.dtype)[:, None]
    v = x * (_ONE / scale if scale > _TINY else _NOTHING)
    draws = uniform(int(key), len(x), first)
    coded = (1 + (draws < v) - (draws < -v).astype(np.int8)).astype(packed.dtype)
    for start in range(0, len(x), BLOCK):
        piece = coded[start : start + BLOCK]
        part = -(-len(piece) // per)
        padded = np.ones(part * per, packed.dtype)
        padded[: len(piece)] = piece
        words = np.bitwise_or.reduce(padded.reshape(per, part) << shifts, axis=0)
        packed[start // per :][:part] = words
    if keep:
        np.subtract(x, scale * (coded.astype(np.float32) - _ONE), out=left)


def _decode(packed: Any, bits: int, ranks: int, scale: Any, out: Any) -> None:
    size, per = len(out), max(1, 8 // bits)
    mask = np.uint32((1 << bits) - 1)
    middle = np.float32(ranks)
    step = scale / middle
    for start in range(0, size, BLOCK):
        count = min(BLOCK, size - start)
        part = (count + per - 1) // per
        words = packed[start // per : start // per + part]
        for k in range(per):
            values = out[start + k * part : min(start + (k + 1) * part, start + count)]
            shift = np.uint32(k * bits)
            for i in range(len(values)):
                level = np.uint32(np.uint32(np.uint32(words[i]) >> shift) & mask)
                values[i] = step * (np.float32(np.int32(level)) - middle)


def _decode_reference(packed: Array, bits: int, ranks: int, scale: np.float32, out: Floats) -> None:
    per = max(1, 8 // bits)
    shifts = (np.arange(per) * bits).astype(packed.dtype)[:, None]
    mask = packed.dtype.type((1 << bits) - 1)
    middle = np.float32(ranks)
    for start in range(0, len(out), BLOCK):
        values = out[start : start + BLOCK]
        words = packed[start // per :][: -(-len(values) // per)]
        levels = ((words >> shifts) & mask).reshape(-1)[: len(values)]
        values[:] = scale / middle * (levels.astype(np.float32) - middle)


#: (x, found): the largest magnitude, and the sum of squares.
look = Kernel(_look, _look_reference)
#: (x, left, keep, scale, bits, first, key, packed): draw values whose expectation is
#: ``x / scale``, with random numbers from number ``first`` on; where ``keep``, ``left`` becomes
#: what of ``x`` that leaves out.
encode = Kernel(_encode, _encode_reference)
#: (packed, bits, ranks, scale, out): write the mean of so many ranks from their sum.
decode = Kernel(_decode, _decode_reference)
