"""A compressor of gradients for hpc_dl, as a package of its own."""

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from hpc_dl.compress import Bytes, Codec, Floats, Unit
from hpc_dl.errors import OptionError


@dataclass(frozen=True)
class Ternary(Codec):
    """Minus one, zero or one, times the mean magnitude of what is not zero, in two bits.

    Values below ``factor`` mean magnitudes become zero. Li, Zhang, Liu: "Ternary weight
    networks", 2016, where it is done to weights.
    """

    factor: float = 0.7

    name: ClassVar[str] = "ternary"
    summary: ClassVar[str] = "-1, 0 or 1, and a scale for each shard"
    needs_feedback: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if not 0 <= self.factor < 1:
            raise OptionError(f"factor={self.factor}; give a number from 0 to below 1")

    def payload_bytes(self, unit: Unit, size: int) -> float:
        return 4 + 2 * -(-unit.size // 8)

    def encode(self, x: Floats, key: int) -> Bytes:
        magnitudes = np.abs(x)
        large = magnitudes >= self.factor * magnitudes.mean(dtype=np.float64)
        scale = magnitudes.mean(dtype=np.float64, where=large)
        bits = np.packbits(np.stack([large, x < 0]), axis=1)
        return np.concatenate([np.float32([scale]).view(np.uint8), bits.reshape(-1)])

    def decode(self, payload: Bytes, out: Floats) -> None:
        (scale,) = payload[:4].view(np.float32)
        bits = payload[4:].reshape(2, -1)
        large, negative = np.unpackbits(bits, axis=1, count=len(out))
        out[:] = np.where(negative, -scale, scale) * large
