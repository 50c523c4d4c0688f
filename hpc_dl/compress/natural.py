"""The nearest powers of two, at random."""

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from hpc_dl.compress.base import Bytes, Codec, Floats, Unit
from hpc_dl.compress.kernels import natural


@dataclass(frozen=True)
class Natural(Codec):
    """Round to the power of two below or above at random, which is right in the mean.

    A sign and seven bits of exponent: from 2**-63 to 2**63, and zero. Values below are rounded
    to zero or 2**-63, those above become 2**63. Horvath et al., "Natural compression for
    distributed deep learning", MSML 2022.
    """

    name: ClassVar[str] = "natural"
    summary: ClassVar[str] = "powers of two, rounded at random, in 8 bits"

    def payload_bytes(self, unit: Unit, size: int) -> float:
        """Return a byte for each value."""
        return unit.size

    def encode(self, x: Floats, key: int) -> Bytes:
        """Encode ``x``."""
        payload = np.empty(len(x), np.uint8)
        natural.encode(x, x, False, np.uint32(key), payload)
        return payload

    def encode_with_residual(self, x: Floats, left: Floats, key: int) -> Bytes:
        """Encode ``x + left``; ``left`` becomes the rest."""
        payload = np.empty(len(x), np.uint8)
        natural.encode(x, left, True, np.uint32(key), payload)
        return payload

    def decode(self, payload: Bytes, out: Floats) -> None:
        """Write the decoded values."""
        natural.decode(payload, out, False)

    def decode_add(self, payload: Bytes, out: Floats) -> None:
        """Add the decoded values."""
        natural.decode(payload, out, True)
