"""Eight-bit floats (e4m3, without infinity), on a scale of the largest magnitude of a block.

Rounding to the nearest, ties to even: that of a carry into the bits that stay for numbers
with a leading one, and that of a float32 sum for the smaller ones.
"""

from typing import Any

import ml_dtypes
import numpy as np

from hpc_dl.compress.base import Bytes, Floats
from hpc_dl.compress.kernels.compile import Kernel

#: The largest e4m3.
LARGEST = np.float32(448)
E4M3 = np.dtype(ml_dtypes.float8_e4m3fn)

_TABLE = np.arange(256).astype(np.uint8).view(E4M3).astype(np.float32)
#: The smallest e4m3 with a leading one, and its bits.
_NORMAL = np.uint32(np.float32(2.0**-6).view(np.uint32))
#: Floats from here on are as far apart as the smallest e4m3 are.
_SHIFT = np.float32(2.0**14)
_SHIFT_BITS = np.uint32(_SHIFT.view(np.uint32))
#: Somewhat below the largest float32: rounding of what is decoded cannot go beyond that.
LIMIT = np.float32(3.4e38)
#: The inverse of a smaller scale may overflow; it stands for zero.
TINY = np.float32(1e-37)
_ONE, _NOTHING = np.float32(1), np.float32(0)
_MAGNITUDE = np.uint32(0x7FFFFFFF)


def _encode(x: Any, left: Any, keep: bool, block: int, scales: Any, codes: Any) -> None:
    size = len(x)
    scaled = np.zeros(block, np.float32)
    words = scaled.view(np.uint32)
    shifted = np.zeros(block, np.float32)
    low = shifted.view(np.uint32)
    word = np.zeros(1, np.int32)
    bound = word.view(np.float32)
    for number in range(len(scales)):
        start = number * block
        count = min(block, size - start)
        values = x[start : start + count]
        if keep:
            values = left[start : start + count]
            added = x[start : start + count]
            for i in range(count):
                values[i] = values[i] + added[i]
        bits = values.view(np.int32)
        top = np.int32(0)
        for i in range(count):
            top = max(top, np.int32(bits[i] & np.int32(0x7FFFFFFF)))
        word[0] = top
        scale = min(bound[0], LIMIT) / LARGEST
        inverse = _NOTHING
        if scale > TINY:
            inverse = _ONE / scale
        else:
            scale = _NOTHING
        scales[number] = scale
        for i in range(count):
            v = values[i] * inverse
            v = min(max(v, -LARGEST), LARGEST)
            scaled[i] = v
            shifted[i] = abs(v) + _SHIFT
        coded = codes[start : start + count]
        for i in range(count):
            w = words[i]
            a = np.uint32(w & _MAGNITUDE)
            odd = np.uint32((a >> np.uint32(20)) & np.uint32(1))
            high = np.uint32(np.uint32(a + np.uint32(0x7FFFF) + odd) >> np.uint32(20))
            c = (
                np.uint32(high - np.uint32(960))
                if a >= _NORMAL
                else np.uint32(low[i] - _SHIFT_BITS)
            )
            coded[i] = np.uint8(c | np.uint32((w >> np.uint32(24)) & np.uint32(128)))
        if keep:
            for i in range(count):
                values[i] = values[i] - scale * _TABLE[coded[i]]


def _encode_reference(
    x: Floats, left: Floats, keep: bool, block: int, scales: Floats, codes: Bytes
) -> None:
    if keep:
        left += x
    for number in range(len(scales)):
        part = slice(number * block, (number + 1) * block)
        values = (left if keep else x)[part]
        scale = min(np.abs(values).max(), LIMIT) / LARGEST
        inverse = _ONE / scale if scale > TINY else _NOTHING
        scale = scale if scale > TINY else _NOTHING
        scales[number] = scale
        narrow = np.clip(values * inverse, -LARGEST, LARGEST).astype(E4M3)
        codes[part] = narrow.view(np.uint8)
        if keep:
            values -= scale * narrow.astype(np.float32)


def _decode(scales: Any, codes: Any, block: int, out: Any, add: bool) -> None:
    for number in range(len(scales)):
        start = number * block
        count = min(block, len(out) - start)
        scale = scales[number]
        values, coded = out[start : start + count], codes[start : start + count]
        if add:
            for i in range(count):
                values[i] = values[i] + scale * _TABLE[coded[i]]
        else:
            for i in range(count):
                values[i] = scale * _TABLE[coded[i]]


def _decode_reference(scales: Floats, codes: Bytes, block: int, out: Floats, add: bool) -> None:
    values = np.repeat(scales, block)[: len(out)] * codes.view(E4M3).astype(np.float32)
    np.copyto(out, out + values if add else values)


#: (x, left, keep, block, scales, codes): round ``x``, or where ``keep`` ``x + left``, and
#: ``left`` becomes the rest.
encode = Kernel(_encode, _encode_reference)
#: (scales, codes, block, out, add): write or add the decoded values.
decode = Kernel(_decode, _decode_reference)
