"""One bit for each value: signSGD and the scaled sign."""

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from hpc_dl.compress.base import Bytes, Codec, Floats, Unit
from hpc_dl.compress.kernels import signs


@dataclass(frozen=True)
class OneBit(Codec):
    """The sign of each value, and the mean magnitude of each block of 1024.

    Karimireddy et al., "Error feedback fixes SignSGD", ICML 2019; the reducing rank encodes
    with a residual of its own (Tang et al., "DoubleSqueeze", ICML 2019).
    """

    name: ClassVar[str] = "onebit"
    summary: ClassVar[str] = "sign, and mean magnitude of each 1024"
    needs_feedback: ClassVar[bool] = True
    align: ClassVar[int] = signs.BLOCK

    def payload_bytes(self, unit: Unit, size: int) -> float:
        """Return a bit for each value and four bytes for each block."""
        return unit.size / 8 + 4 * -(-unit.size // signs.BLOCK)

    def encode(self, x: Floats, key: int) -> Bytes:
        """Encode ``x``."""
        return self.encode_with_residual(x, np.zeros_like(x), key)

    def encode_with_residual(self, x: Floats, left: Floats, key: int) -> Bytes:
        """Encode ``x + left``; ``left`` becomes the rest."""
        blocks = -(-len(x) // signs.BLOCK)
        payload = np.empty(4 * blocks + -(-len(x) // 8), np.uint8)
        signs.encode(x, left, payload[: 4 * blocks].view(np.float32), payload[4 * blocks :])
        return payload

    def decode(self, payload: Bytes, out: Floats) -> None:
        """Write the decoded values."""
        self._decode(payload, out, add=False)

    def decode_add(self, payload: Bytes, out: Floats) -> None:
        """Add the decoded values."""
        self._decode(payload, out, add=True)

    def _decode(self, payload: Bytes, out: Floats, add: bool) -> None:
        blocks = -(-len(out) // signs.BLOCK)
        signs.decode(payload[: 4 * blocks].view(np.float32), payload[4 * blocks :], out, add)


@dataclass(frozen=True)
class SignSgd(Codec):
    """The sign of each value alone; the ranks take a majority vote.

    What comes out is ``scale`` or ``-scale``: choose the learning rate for that. A zero, and a
    tie of the votes, comes out as either with the same probability, so that it has no drift.
    Bernstein et al., "signSGD with majority vote", ICLR 2019.
    """

    scale: float = 1.0

    name: ClassVar[str] = "signsgd"
    summary: ClassVar[str] = "sign alone, by majority vote"
    keeps_scale: ClassVar[bool] = False
    align: ClassVar[int] = 8
    votes: ClassVar[bool] = True

    def payload_bytes(self, unit: Unit, size: int) -> float:
        """Return a bit for each value."""
        return unit.size / 8

    def encode(self, x: Floats, key: int) -> Bytes:
        """Encode ``x``."""
        payload = np.empty(-(-len(x) // 8), np.uint8)
        signs.pack(x, key, payload)
        return payload

    def decode(self, payload: Bytes, out: Floats) -> None:
        """Write plus or minus ``scale``."""
        signs.decode(self._scales(out), payload, out, False)

    def decode_add(self, payload: Bytes, out: Floats) -> None:
        """Add plus or minus ``scale``."""
        signs.decode(self._scales(out), payload, out, True)

    def _scales(self, out: Floats) -> Floats:
        return np.full(-(-len(out) // signs.BLOCK), self.scale, np.float32)
