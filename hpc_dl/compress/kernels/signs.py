"""One bit for each value and one scale for each block.

Sums are taken in the order of ``lanes``, so compiled and NumPy code give the same bits.
"""

from typing import Any

import numpy as np

from hpc_dl.compress.base import Bytes, Floats
from hpc_dl.compress.kernels.compile import Kernel
from hpc_dl.compress.kernels.draw import hash_of
from hpc_dl.compress.kernels.lanes import LANES, total
from hpc_dl.compress.random import hashed

#: Values that share a scale.
BLOCK = 1024


def _encode(x: Any, left: Any, scales: Any, bits: Any) -> None:
    size = len(left)
    lanes = np.zeros(LANES, np.float32)
    for number in range(len(scales)):
        start = number * BLOCK
        count = min(BLOCK, size - start)
        block, added = left[start : start + count], x[start : start + count]
        lanes[:] = 0
        whole = count // LANES * LANES
        for i in range(0, whole, LANES):
            for lane in range(LANES):
                y = block[i + lane] + added[i + lane]
                block[i + lane] = y
                lanes[lane] += abs(y)
        for i in range(whole, count):
            y = block[i] + added[i]
            block[i] = y
            lanes[i - whole] += abs(y)
        fold = LANES // 2
        while fold:
            for lane in range(fold):
                lanes[lane] += lanes[lane + fold]
            fold //= 2
        scale = lanes[0] / np.float32(count)
        scales[number] = scale
        packed = bits[start // 8 : start // 8 + (count + 7) // 8]
        for byte in range(count // 8):
            word = np.uint8(0)
            for bit in range(8):
                y = block[byte * 8 + bit]
                negative = y < 0
                word |= np.uint8(negative) << np.uint8(bit)
                block[byte * 8 + bit] = y + scale if negative else y - scale
            packed[byte] = word
        if count % 8:
            word = np.uint8(0)
            for i in range(count // 8 * 8, count):
                y = block[i]
                negative = y < 0
                word |= np.uint8(negative) << np.uint8(i % 8)
                block[i] = y + scale if negative else y - scale
            packed[count // 8] = word


def _encode_reference(x: Floats, left: Floats, scales: Floats, bits: Bytes) -> None:
    np.add(left, x, out=left)
    for number in range(len(scales)):
        block = left[number * BLOCK : (number + 1) * BLOCK]
        scale = total(np.abs(block)) / np.float32(len(block))
        scales[number] = scale
        negative = block < 0
        packed = np.packbits(negative, bitorder="little")
        bits[number * BLOCK // 8 :][: len(packed)] = packed
        np.subtract(block, np.where(negative, -scale, scale), out=block)


def _pack(x: Any, key: Any, bits: Any) -> None:
    for byte in range(len(x) // 8):
        negative, zero = np.uint8(0), np.uint8(0)
        for bit in range(8):
            y = x[byte * 8 + bit]
            negative |= np.uint8(y < 0) << np.uint8(bit)
            zero |= np.uint8(y == 0) << np.uint8(bit)
        bits[byte] = negative | (zero & np.uint8(hash_of(key, byte) >> np.uint32(24)))
    if len(x) % 8:
        byte = len(x) // 8
        drawn = hash_of(key, byte) >> np.uint32(24)
        word = np.uint32(0)
        for i in range(byte * 8, len(x)):
            flag = np.uint32(1) << np.uint32(i % 8)
            if x[i] < 0:
                word |= flag
            elif x[i] == 0:
                word |= drawn & flag
        bits[byte] = word


def _pack_reference(x: Floats, key: int, bits: Bytes) -> None:
    drawn = hashed(key, np.arange(len(bits), dtype=np.uint32)) >> np.uint32(24)
    zero = np.packbits(x == 0, bitorder="little") & drawn.astype(np.uint8)
    bits[:] = np.packbits(x < 0, bitorder="little") | zero


def _decode(scales: Any, bits: Any, out: Any, add: bool) -> None:
    size = len(out)
    for number in range(len(scales)):
        start = number * BLOCK
        count = min(BLOCK, size - start)
        scale, block = scales[number], out[start : start + count]
        packed = bits[start // 8 : start // 8 + (count + 7) // 8]
        for byte in range(count // 8):
            word = packed[byte]
            for bit in range(8):
                value = -scale if (word >> np.uint8(bit)) & np.uint8(1) else scale
                block[byte * 8 + bit] = block[byte * 8 + bit] + value if add else value
        for i in range(count // 8 * 8, count):
            value = -scale if (packed[i // 8] >> np.uint8(i % 8)) & np.uint8(1) else scale
            block[i] = block[i] + value if add else value


def _decode_reference(scales: Floats, bits: Bytes, out: Floats, add: bool) -> None:
    negative = np.unpackbits(bits, count=len(out), bitorder="little").astype(bool)
    each = np.repeat(scales, BLOCK)[: len(out)]
    values = np.where(negative, -each, each)
    if add:
        out += values
    else:
        out[:] = values


#: (x, left, scales, bits): encode ``x + left``; ``left`` becomes the residual.
encode = Kernel(_encode, _encode_reference)
#: (x, key, bits): pack the signs alone; that of a zero is drawn, one byte for eight values.
pack = Kernel(_pack, _pack_reference)
#: (scales, bits, out, add): write or add the decoded values.
decode = Kernel(_decode, _decode_reference)
