"""Powers of two: sign and exponent, rounded at random.

A float32 lies between two powers of two at the place that its mantissa says. A random number
of as many bits is added to it, and carries into the exponent with that probability.
"""

from typing import Any

import numpy as np

from hpc_dl.compress.base import Bytes, Floats
from hpc_dl.compress.kernels.compile import Kernel
from hpc_dl.compress.kernels.draw import hash_of
from hpc_dl.compress.random import hashed

#: Codes 1 to 127 stand for 2**-63 to 2**63, and 0 for zero.
SMALLEST, LARGEST = np.float32(2.0**-63), np.float32(2.0**63)
_BELOW = np.uint32(127 - 64)  # what an exponent's bits are above its code
_SMALLEST_BITS = np.uint32(SMALLEST.view(np.uint32))
_INVERSE = np.float32(2.0**63)

_POWERS = np.ldexp(np.float32(1), np.arange(128) - 64).astype(np.float32)
_POWERS[0] = 0
_TABLE = np.concatenate([_POWERS, -_POWERS])

_ULP = np.float32(2.0**-24)
_BLOCK = 1024
_MAGNITUDE = np.uint32(0x7FFFFFFF)


def _encode(x: Any, left: Any, keep: bool, key: Any, codes: Any) -> None:
    size = len(x)
    draws = np.zeros(_BLOCK, np.uint32)
    tiny = np.zeros(_BLOCK, np.uint8)
    for start in range(0, size, _BLOCK):
        count = min(_BLOCK, size - start)
        values = x[start : start + count]
        if keep:
            values = left[start : start + count]
            added = x[start : start + count]
            for i in range(count):
                values[i] = values[i] + added[i]
        for i in range(count):
            draws[i] = hash_of(key, start + i) >> np.uint32(8)
        for i in range(count):
            tiny[i] = np.float32(np.int32(draws[i])) * _ULP < abs(values[i]) * _INVERSE
        words, coded = values.view(np.uint32), codes[start : start + count]
        for i in range(count):
            w = words[i]
            a = np.uint32(w & _MAGNITUDE)
            carried = np.uint32(np.uint32(a + (draws[i] >> np.uint32(1))) >> np.uint32(23))
            c = np.uint32(min(np.uint32(carried - _BELOW), np.uint32(127)))
            c = c if a >= _SMALLEST_BITS else np.uint32(tiny[i])
            coded[i] = np.uint8(c | np.uint32((w >> np.uint32(24)) & np.uint32(128)))
        if keep:
            for i in range(count):
                values[i] = values[i] - _TABLE[coded[i]]


def _encode_reference(x: Floats, left: Floats, keep: bool, key: np.uint32, codes: Bytes) -> None:
    values = np.add(left, x, out=left) if keep else x
    draws = hashed(int(key), np.arange(len(values), dtype=np.uint32)) >> np.uint32(8)
    words = values.view(np.uint32)
    magnitudes = words & _MAGNITUDE
    carried = (magnitudes + (draws >> np.uint32(1))) >> np.uint32(23)
    within = magnitudes >= _SMALLEST_BITS
    normal = np.minimum(carried - _BELOW, np.uint32(127))
    # Only for small values: the product of others overflows.
    small = np.where(within, np.float32(0), np.abs(values)) * _INVERSE
    tiny = draws.astype(np.float32) * _ULP < small
    codes[:] = np.where(within, normal, tiny) | ((words >> np.uint32(24)) & np.uint32(128))
    if keep:
        values -= _TABLE[codes]


def _decode(codes: Any, out: Any, add: bool) -> None:
    if add:
        for i in range(len(out)):
            out[i] = out[i] + _TABLE[codes[i]]
    else:
        for i in range(len(out)):
            out[i] = _TABLE[codes[i]]


def _decode_reference(codes: Bytes, out: Floats, add: bool) -> None:
    values = _TABLE[codes]
    np.copyto(out, out + values if add else values)


#: (x, left, keep, key, codes): round ``x``, or where ``keep`` ``x + left``, and ``left``
#: becomes the rest.
encode = Kernel(_encode, _encode_reference)
#: (codes, out, add): write or add the decoded values.
decode = Kernel(_decode, _decode_reference)
