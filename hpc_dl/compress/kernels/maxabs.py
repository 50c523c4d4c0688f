"""Eight bits for each value, on a scale of the largest magnitude of each block."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from hpc_dl.compress.base import Floats
from hpc_dl.compress.kernels.compile import Kernel

BLOCK = 1024
#: A scale that is not above this stands for zeros: its inverse may overflow.
TINY = np.float32(1e-37)


def _encode(x: Any, scales: Any, levels: Any) -> None:
    for number in range(len(scales)):
        start = number * BLOCK
        count = min(BLOCK, len(x) - start)
        block, coded = x[start : start + count], levels[start : start + count]
        largest = np.float32(0)
        for i in range(count):
            largest = max(largest, abs(block[i]))
        scale = largest / np.float32(127)
        scales[number] = scale
        inverse = np.float32(1) / scale if scale > TINY else np.float32(0)
        for i in range(count):
            coded[i] = np.int8(np.rint(block[i] * inverse))


def _encode_reference(x: Floats, scales: Floats, levels: NDArray[np.int8]) -> None:
    for number in range(len(scales)):
        part = slice(number * BLOCK, (number + 1) * BLOCK)
        scale = np.abs(x[part]).max() / np.float32(127)
        scales[number] = scale
        inverse = np.float32(1) / scale if scale > TINY else np.float32(0)
        levels[part] = np.rint(x[part] * inverse)


def _decode(scales: Any, levels: Any, out: Any) -> None:
    for number in range(len(scales)):
        start = number * BLOCK
        scale = scales[number]
        for i in range(start, min(start + BLOCK, len(out))):
            out[i] = scale * np.float32(levels[i])


def _decode_reference(scales: Floats, levels: NDArray[np.int8], out: Floats) -> None:
    out[:] = np.repeat(scales, BLOCK)[: len(out)] * levels.astype(np.float32)


#: (x, scales, levels): round to the nearest of 255 steps.
encode = Kernel(_encode, _encode_reference)
#: (scales, levels, out): write the values.
decode = Kernel(_decode, _decode_reference)
