"""Decoupled momentum: the fast components of each rank's momentum, in a cosine basis."""

import functools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import numpy as np

from hpc_dl.compress.base import Floats, Sparse, Sparsifier, State, Step, Unit
from hpc_dl.compress.kernels.demo import CHUNK, pick
from hpc_dl.errors import OptionError

#: Chunks that are transformed at a time: a megabyte, which stays in the cache.
_AT_A_TIME = 4096


@functools.cache
def cosines() -> Floats:
    """Return the waves of the orthonormal DCT-II, one in each row."""
    k, n = np.mgrid[:CHUNK, :CHUNK]
    waves = np.sqrt(2 / CHUNK) * np.cos(np.pi * (2 * n + 1) * k / (2 * CHUNK))
    waves[0] /= np.sqrt(2)
    return np.ascontiguousarray(waves, np.float32)


class _Range(NamedTuple):
    """A part of a flat array: whole chunks, or a tail that fills none."""

    start: int
    stop: int

    @property
    def whole(self) -> bool:
        return (self.stop - self.start) % CHUNK == 0


@functools.lru_cache(maxsize=1024)
def _ranges(unit: Unit) -> tuple[_Range, ...]:
    found = []
    for segment in unit.segments:
        tail = segment.stop - segment.size % CHUNK
        found += [_Range(segment.offset, tail), _Range(tail, segment.stop)]
    return tuple(part for part in found if part.start < part.stop)


def _pieces(unit: Unit) -> Iterator[_Range]:
    """Cut the whole chunks into what stays in the cache."""
    length = _AT_A_TIME * CHUNK
    for start, stop in _ranges(unit):
        for lo in range(start, stop, length):
            yield _Range(lo, min(stop, lo + length))


@dataclass(frozen=True)
class Demo(Sparsifier):
    """The largest cosine coefficients of each chunk of 64 of the momentum.

    What is not sent is the momentum: it decays, gradients add to it, and what is sent is
    taken off. The optimizer must have no momentum of its own; without error feedback there
    is none at all. The end of a parameter that fills no chunk is not transformed. Peng,
    Quesnelle, Kingma: "DeMo: decoupled momentum optimization", 2024.

    Args:
        k: coefficients of each chunk that are sent.
        decay: what stays of the momentum in each step; 1 forgets nothing.
    """

    k: int = 4
    decay: float = 0.999

    name: ClassVar[str] = "demo"
    summary: ClassVar[str] = "largest cosine coefficients of each 64 of a local momentum"
    owns_momentum: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if not 1 <= self.k <= CHUNK:
            raise OptionError(f"k={self.k}; give coefficients of a chunk, from 1 to {CHUNK}")
        if not 0 <= self.decay <= 1:
            raise OptionError(f"decay={self.decay}; give a number from 0 to 1")

    def payload_bytes(self, unit: Unit, size: int) -> float:
        """Return an int32 and a float32 for each coefficient."""
        return 8 * self._room(_ranges(unit))

    def select(self, x: Floats, state: State, unit: Unit, step: Step) -> Sparse:
        """Select coefficients of ``x``."""
        return self._select(x, None, unit)

    def select_with_residual(
        self, x: Floats, left: Floats, state: State, unit: Unit, step: Step
    ) -> Sparse:
        """Select coefficients of ``decay * left + x``; ``left`` becomes the rest."""
        return self._select(x, left, unit)

    def restore(self, total: Floats, out: Floats, unit: Unit) -> None:
        """Transform summed coefficients back; ``out`` is other memory."""
        np.copyto(out, total)
        for piece in _pieces(unit):
            if piece.whole:
                part = slice(*piece)
                np.matmul(_chunks(total[part]), cosines(), out=_chunks(out[part]))

    def _room(self, ranges: tuple[_Range, ...]) -> int:
        """Return how many coefficients are sent at most: all but zeros."""
        return sum(
            (stop - start) // CHUNK * self.k + min(self.k, (stop - start) % CHUNK)
            for start, stop in ranges
        )

    def _select(self, x: Floats, left: Floats | None, unit: Unit) -> Sparse:
        room = self._room(_ranges(unit))
        indices, values = np.empty(room, np.int32), np.empty(room, np.float32)
        waves, ends, found = cosines(), np.eye(CHUNK, dtype=np.float32), 0
        scratch = np.empty(_AT_A_TIME * CHUNK, np.float32)
        for piece in _pieces(unit):
            part = slice(*piece)
            whole = x[part]
            if left is not None:
                whole = left[part]
                whole *= np.float32(self.decay)
                whole += x[part]
            if piece.whole:
                coefficients = scratch[: len(whole)]
                np.matmul(_chunks(whole), waves.T, out=_chunks(coefficients))
                basis, rest = waves, whole
            else:
                coefficients = np.zeros(CHUNK, np.float32)
                coefficients[: len(whole)] = whole
                basis, rest = ends, coefficients.copy()
            count = pick(
                coefficients,
                basis,
                self.k,
                rest,
                left is not None,
                indices[found:],
                values[found:],
            )
            if left is not None and not piece.whole:
                whole[:] = rest[: len(whole)]
            indices[found : found + count] += piece.start
            found += count
        return Sparse(indices[:found].copy(), values[:found].copy())


def _chunks(flat: Floats) -> Floats:
    return flat.reshape(-1, CHUNK)
