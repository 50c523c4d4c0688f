"""Evenly spaced levels: a middle, a step, and a few bits for each value of a block.

A block is worked on in the first-level cache, in loops without branches. The range of floats
is found as that of integers in the same order, since compilers reorder a maximum of integers
only. The middle of the range, not its end, is what values are measured from: no difference
overflows then. A byte holds values that are ``part`` apart, so that packing needs no shuffle.
"""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from hpc_dl.compress.base import Bytes, Floats
from hpc_dl.compress.kernels.compile import Kernel
from hpc_dl.compress.kernels.draw import uniform_of
from hpc_dl.compress.kernels.lanes import LANES, total
from hpc_dl.compress.random import uniform

#: What a block's range is: from its least to its largest value, or as far on both sides of
#: zero as its largest magnitude or its Euclidean norm.
MIN_MAX, MAX, L2 = 0, 1, 2

#: Somewhat below the largest float32: rounding of what is decoded cannot go beyond that.
LIMIT = np.float32(3.4e38)
LARGEST = np.finfo(np.float32).max
#: The inverse of a smaller step may overflow; it stands for zero.
TINY = np.float32(1e-37)
_ONE, _HALF, _NOTHING = np.float32(1), np.float32(0.5), np.float32(0)
_MAGNITUDE = np.int32(0x7FFFFFFF)


def _encode(
    x: Any,
    left: Any,
    keep: bool,
    block: int,
    bits: int,
    kind: int,
    random: bool,
    key: Any,
    middles: Any,
    steps: Any,
    codes: Any,
) -> None:
    size, per = len(x), 8 // bits
    half = np.float32((1 << bits) - 1 - (kind != MIN_MAX)) * _HALF
    coded = np.zeros(block, np.uint8)
    draws = np.full(block, _HALF, np.float32)
    lanes = np.zeros(LANES, np.float32)
    ends = np.zeros(2, np.int32)
    bounds = ends.view(np.float32)
    for number in range(len(steps)):
        start = number * block
        count = min(block, size - start)
        values = x[start : start + count]
        if keep:
            values = left[start : start + count]
            added = x[start : start + count]
            for i in range(count):
                values[i] = values[i] + added[i]

        ordered = values.view(np.int32)
        low, high = np.int32(0x7FFFFFFF), np.int32(-0x80000000)
        for i in range(count):
            word = ordered[i]
            place = np.int32(word ^ ((word >> np.int32(31)) & _MAGNITUDE))
            low = min(low, place)
            high = max(high, place)
        ends[0] = low ^ ((low >> np.int32(31)) & _MAGNITUDE)
        ends[1] = high ^ ((high >> np.int32(31)) & _MAGNITUDE)
        least, largest = max(bounds[0], -LIMIT), min(bounds[1], LIMIT)
        middle, reach = _NOTHING, half
        if kind == MIN_MAX:
            middle = largest * _HALF + least * _HALF
            step = (largest * _HALF - least * _HALF) / half
        else:
            largest = max(largest, -least)
            step = largest / half
        if kind == L2 and step > TINY:
            shrink = _ONE / largest
            lanes[:] = 0
            whole = count // LANES * LANES
            for i in range(0, whole, LANES):
                for lane in range(LANES):
                    part_of = values[i + lane] * shrink
                    lanes[lane] += part_of * part_of
            for i in range(whole, count):
                part_of = values[i] * shrink
                lanes[i - whole] += part_of * part_of
            fold = LANES // 2
            while fold:
                for lane in range(fold):
                    lanes[lane] += lanes[lane + fold]
                fold //= 2
            # A product beyond the largest number would be one; so many steps are in reach.
            ratio = np.sqrt(lanes[0]) / half
            step = LIMIT if ratio > _ONE and largest > LIMIT / ratio else largest * ratio
            reach = min(half, np.floor(LARGEST / step))
        inverse = _NOTHING
        if step > TINY:
            inverse = _ONE / step
        else:
            step = _NOTHING
        middles[number], steps[number] = middle, step

        if random:
            for i in range(count):
                draws[i] = uniform_of(key, start + i)
        bottom, top = half - reach, half + reach
        for i in range(count):
            v = (values[i] - middle) * inverse + half
            v = min(max(v, bottom), top)
            floor = np.int32(v)
            coded[i] = floor + (draws[i] < v - np.float32(floor))
        if keep:
            for i in range(count):
                values[i] = values[i] - (middle + step * (np.float32(coded[i]) - half))

        part = (count + per - 1) // per
        for i in range(count, part * per):
            coded[i] = np.uint8(0)
        packed = codes[start // per : start // per + part]
        for i in range(part):
            packed[i] = coded[i]
        for k in range(1, per):
            piece = coded[k * part : (k + 1) * part]
            factor = np.uint8(1 << (k * bits))
            for i in range(part):
                packed[i] = np.uint8(packed[i] | np.uint8(piece[i] * factor))


def _order(words: NDArray[np.int32]) -> NDArray[np.int32]:
    """Map floats' bits to integers in the same order, and back."""
    return words ^ ((words >> 31) & _MAGNITUDE)


def _range(values: Floats, kind: int, half: np.float32) -> tuple[np.float32, ...]:
    """Return a block's middle, step, and how many steps are in reach on both sides."""
    places = _order(values.view(np.int32))
    ends = _order(np.array([places.min(), places.max()], np.int32)).view(np.float32)
    least, largest = max(ends[0], -LIMIT), min(ends[1], LIMIT)
    if kind == MIN_MAX:
        middle = largest * _HALF + least * _HALF
        return middle, (largest * _HALF - least * _HALF) / half, half
    largest = max(largest, -least)
    step, reach = largest / half, half
    if kind == L2 and step > TINY:
        ratio = np.sqrt(total(np.square(values * (_ONE / largest)))) / half
        step = LIMIT if ratio > _ONE and largest > LIMIT / ratio else largest * ratio
        reach = min(half, np.floor(LARGEST / step))
    return _NOTHING, step, reach


def _encode_reference(
    x: Floats,
    left: Floats,
    keep: bool,
    block: int,
    bits: int,
    kind: int,
    random: bool,
    key: np.uint32,
    middles: Floats,
    steps: Floats,
    codes: Bytes,
) -> None:
    per = 8 // bits
    half = np.float32((1 << bits) - 1 - (kind != MIN_MAX)) * _HALF
    if keep:
        left += x
    for number in range(len(steps)):
        start = number * block
        values = (left if keep else x)[start : start + block]
        middle, step, reach = _range(values, kind, half)
        inverse = _ONE / step if step > TINY else _NOTHING
        step = step if step > TINY else _NOTHING
        middles[number], steps[number] = middle, step
        draws = uniform(int(key), len(values), start) if random else _HALF
        v = (values - middle) * inverse + half
        v = np.clip(v, half - reach, half + reach)
        coded = (np.floor(v) + (draws < v - np.floor(v))).astype(np.uint8)
        if keep:
            values -= middle + step * (coded.astype(np.float32) - half)
        part = -(-len(values) // per)
        padded = np.zeros(part * per, np.uint8)
        padded[: len(values)] = coded
        shifts = (np.arange(per) * bits).astype(np.uint8)[:, None]
        packed = np.bitwise_or.reduce(padded.reshape(per, part) << shifts, axis=0)
        codes[start // per :][:part] = packed


def _decode(
    middles: Any, steps: Any, codes: Any, block: int, bits: int, kind: int, out: Any, add: bool
) -> None:
    size, per = len(out), 8 // bits
    half = np.float32((1 << bits) - 1 - (kind != MIN_MAX)) * _HALF
    mask = np.uint8((1 << bits) - 1)
    coded = np.zeros(block, np.uint8)
    for number in range(len(steps)):
        start = number * block
        count = min(block, size - start)
        part = (count + per - 1) // per
        packed = codes[start // per : start // per + part]
        for k in range(per):
            piece = coded[k * part : (k + 1) * part]
            shift = np.uint8(k * bits)
            for i in range(part):
                piece[i] = (packed[i] >> shift) & mask
        middle, step = middles[number], steps[number]
        values = out[start : start + count]
        if add:
            for i in range(count):
                values[i] = values[i] + (middle + step * (np.float32(coded[i]) - half))
        else:
            for i in range(count):
                values[i] = middle + step * (np.float32(coded[i]) - half)


def _decode_reference(
    middles: Floats,
    steps: Floats,
    codes: Bytes,
    block: int,
    bits: int,
    kind: int,
    out: Floats,
    add: bool,
) -> None:
    per = 8 // bits
    half = np.float32((1 << bits) - 1 - (kind != MIN_MAX)) * _HALF
    mask = np.uint8((1 << bits) - 1)
    for number in range(len(steps)):
        start = number * block
        values = out[start : start + block]
        packed = codes[start // per :][: -(-len(values) // per)]
        shifts = (np.arange(per) * bits).astype(np.uint8)[:, None]
        coded = ((packed >> shifts) & mask).reshape(-1)[: len(values)]
        decoded = middles[number] + steps[number] * (coded.astype(np.float32) - half)
        np.copyto(values, values + decoded if add else decoded)


#: (x, left, keep, block, bits, kind, random, key, middles, steps, codes): round ``x``, or
#: where ``keep`` ``x + left``, and ``left`` becomes the rest; ``random`` rounds up or down
#: with the probability that makes the expectation right.
encode = Kernel(_encode, _encode_reference)
#: (middles, steps, codes, block, bits, kind, out, add): write or add the decoded values.
decode = Kernel(_decode, _decode_reference)
