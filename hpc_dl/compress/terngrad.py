"""Minus one, zero or one at random, times a scale that all ranks share."""

from collections.abc import Generator, Iterator
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from hpc_dl.compress.base import (
    AllReduced,
    Array,
    Floats,
    Reduction,
    Round,
    Segment,
    State,
    Step,
    Unit,
)
from hpc_dl.compress.kernels import ternary
from hpc_dl.compress.random import key_of
from hpc_dl.errors import OptionError

#: Somewhat below the largest float32: rounding of what is decoded cannot go beyond that.
_LIMIT = 3.4e38


def lane_bits(size: int) -> int:
    """Return the bits that hold the sum over so many ranks of 0, 1 or 2.

    Raises:
        OptionError: more ranks than sixteen bits can count.

    >>> lane_bits(4), lane_bits(8)
    (4, 8)
    """
    for bits in (2, 4, 8, 16):
        if 2 * size < 1 << bits:
            return bits
    raise OptionError(f"terngrad on {size} ranks; it can count up to 32767, choose another")


@dataclass(frozen=True)
class TernGrad(AllReduced):
    """Ternary values whose expectation is the gradient, summed in lanes of a few bits.

    The scale is the largest magnitude of each parameter on any rank. Gradients are clipped at
    ``clip`` standard deviations (about zero, so that constant ones stay) before that; 0 does
    not clip. Wen et al., "TernGrad: ternary gradients to reduce communication in distributed
    deep learning", NeurIPS 2017.
    """

    clip: float = 2.5

    name: ClassVar[str] = "terngrad"
    reduction: ClassVar[Reduction] = Reduction.GLOBAL_SCALE
    summary: ClassVar[str] = "-1, 0 or 1 at random, times the largest magnitude of a parameter"

    def __post_init__(self) -> None:
        if not 0 <= self.clip < float("inf"):
            raise OptionError(
                f"clip={self.clip}; give a number of standard deviations, 0 for no clipping"
            )

    def payload_bytes(self, unit: Unit, size: int) -> float:
        """Return a float32 for each parameter, a lane for each value, and padding."""
        return 4 * len(unit.segments) + _nbytes(unit, lane_bits(size))

    def rounds(
        self, x: Floats, out: Floats, left: Floats | None, state: State, unit: Unit, step: Step
    ) -> Generator[Round, None, None]:
        """Agree on scales, then sum ternary values."""
        scales = np.array([self._scale(x[s.offset : s.stop]) for s in unit.segments], np.float32)
        yield Round(scales, "max")
        if not np.isfinite(scales).all():
            out.fill(np.nan)
            return
        bits = lane_bits(step.size)
        key = np.uint32(key_of("terngrad", step.seed, unit.label, step.number, step.rank))
        # All communicators sum this type; since no lane carries, it is the lanes that it sums.
        buffer = np.zeros(_nbytes(unit, bits) // 4, np.int32)
        words = buffer.view(np.uint16 if bits == 16 else np.uint8)
        for segment, scale, packed in _parts(unit, scales, words, bits):
            part = slice(segment.offset, segment.stop)
            rest = x[part] if left is None else left[part]
            keep = left is not None
            ternary.encode(x[part], rest, keep, scale, bits, segment.offset, key, packed)
        yield Round(buffer, "sum")
        out.fill(0)
        for segment, scale, packed in _parts(unit, scales, words, bits):
            ternary.decode(packed, bits, step.size, scale, out[segment.offset : segment.stop])

    def _scale(self, x: Floats) -> float:
        """Return the largest magnitude after clipping, infinity where ``x`` is not finite."""
        if len(x) == 0:
            return 0.0
        found = np.empty(2)
        ternary.look(x, found)
        largest, squares = map(float, found)
        if not np.isfinite(largest):
            return float("inf")
        bound = self.clip * float(np.sqrt(squares / len(x))) if self.clip else largest
        return min(largest, bound, _LIMIT)


def _nbytes(unit: Unit, bits: int) -> int:
    """Return the bytes of all lanes, padded to a multiple of four."""
    words = sum(_length(segment, bits) for segment in unit.segments)
    return -(-words * max(8, bits) // 32) * 4


def _length(segment: Segment, bits: int) -> int:
    """Return the words of a parameter; it begins with a word of its own."""
    per = max(1, 8 // bits)
    return -(-segment.size // per)


def _parts(
    unit: Unit, scales: Floats, words: Array, bits: int
) -> Iterator[tuple[Segment, np.float32, Array]]:
    """Yield each parameter with its scale and its words."""
    start = 0
    for segment, scale in zip(unit.segments, scales, strict=True):
        stop = start + _length(segment, bits)
        yield segment, scale, words[start:stop]
        start = stop
