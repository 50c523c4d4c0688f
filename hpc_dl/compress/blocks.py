"""Codecs that round to evenly spaced levels, block by block."""

from abc import abstractmethod
from typing import ClassVar

import numpy as np

from hpc_dl.compress.base import Bytes, Codec, Floats, Unit
from hpc_dl.compress.kernels import levels
from hpc_dl.errors import OptionError


def check_block(block: int) -> None:
    """Refuse a block that does not end at the end of a byte.

    Raises:
        OptionError: not a multiple of 8, or not above 0.
    """
    if block <= 0 or block % 8:
        raise OptionError(f"block={block}; give a multiple of 8, above 0")


class Levels(Codec):
    """What such codecs share; subclasses are dataclasses with an option ``block``."""

    #: Whether a middle is sent for each block; else it is zero.
    has_middle: ClassVar[bool]
    block: int

    @property
    @abstractmethod
    def width(self) -> int:
        """Bits for each value: 2, 4 or 8."""

    @property
    @abstractmethod
    def kind(self) -> int:
        """What a block's range is: one of ``levels``' kinds."""

    @property
    @abstractmethod
    def random(self) -> bool:
        """Whether values are rounded at random."""

    @property
    def align(self) -> int:
        """Shards consist of whole blocks."""
        return self.block

    def payload_bytes(self, unit: Unit, size: int) -> float:
        """Return the bits of all values, and four bytes for each block's step and middle."""
        return self._header(unit.size) + -(-unit.size * self.width // 8)

    def encode(self, x: Floats, key: int) -> Bytes:
        """Encode ``x``."""
        return self._encode(x, x, False, key)

    def encode_with_residual(self, x: Floats, left: Floats, key: int) -> Bytes:
        """Encode ``x + left``; ``left`` becomes the rest."""
        return self._encode(x, left, True, key)

    def decode(self, payload: Bytes, out: Floats) -> None:
        """Write the decoded values."""
        self._decode(payload, out, add=False)

    def decode_add(self, payload: Bytes, out: Floats) -> None:
        """Add the decoded values."""
        self._decode(payload, out, add=True)

    def _header(self, size: int) -> int:
        return 4 * (1 + self.has_middle) * -(-size // self.block)

    def _parts(self, payload: Bytes, size: int) -> tuple[Floats, Floats, Bytes]:
        """Return middles, steps and codes."""
        header = self._header(size)
        numbers = payload[:header].view(np.float32)
        if self.has_middle:
            middles, steps = numbers[: len(numbers) // 2], numbers[len(numbers) // 2 :]
        else:
            middles, steps = np.zeros_like(numbers), numbers
        return middles, steps, payload[header:]

    def _encode(self, x: Floats, left: Floats, keep: bool, key: int) -> Bytes:
        payload = np.empty(self._header(len(x)) + -(-len(x) * self.width // 8), np.uint8)
        levels.encode(
            x,
            left,
            keep,
            self.block,
            self.width,
            self.kind,
            self.random,
            np.uint32(key),
            *self._parts(payload, len(x)),
        )
        return payload

    def _decode(self, payload: Bytes, out: Floats, add: bool) -> None:
        parts = self._parts(payload, len(out))
        levels.decode(*parts, self.block, self.width, self.kind, out, add)
