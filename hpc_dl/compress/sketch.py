"""Sketches: sums that stand for many more entries, of which the large ones can be told."""

import functools
from abc import ABC, abstractmethod
from collections.abc import Generator
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from hpc_dl.compress.base import AllReduced, Floats, Reduction, Round, State, Step, Unit
from hpc_dl.compress.kernels import countsketch, hadamard
from hpc_dl.compress.kernels.checks import is_finite
from hpc_dl.compress.random import hashed, key_of
from hpc_dl.compress.topk import check_ratio, count_of, largest
from hpc_dl.errors import OptionError

KINDS = ("count", "projection")
#: Tables of a count sketch: those of the median, and one to check what is found.
TABLES = countsketch.MEDIAN + 1
#: Numbers of a sketch for each entry that can be told.
TOLD = {"count": 50, "projection": 5}
#: Longest run of entries that is hashed as one.
RUN = 64


@dataclass(frozen=True)
class Sketch(AllReduced):
    """A linear sketch, summed by all-reduce, from which the largest entries are recovered.

    ``count``: a count sketch of five tables; the entries with the largest medians are kept.
    Charikar, Chen, Farach-Colton, ICALP 2002; for gradients: Ivkin et al., NeurIPS 2019, and
    Rothchild et al., "FetchSGD", ICML 2020. ``projection``: compressed sensing of each block
    of 1024 by random +-1 projections and hard thresholding pursuit, which is iterative hard
    thresholding with least squares in each step (Foucart, SIAM J. Numer. Anal., 2011). A part
    of each sketch is held back to check what was found: it is scaled to be nearest to the
    gradient, so that error feedback converges even where little is to be found.
    Entries beyond 1e36 may overflow, which counts as a gradient that is not finite.

    Args:
        kind: one of both.
        ratio: the size of the sketch, in sizes of the gradient.
        keep: the part of the entries that is recovered, not more than ``ratio``. 0 takes
            as many as a sketch of this size can tell: a 50th of its numbers with ``count``, a
            5th with ``projection``.
        recovery_steps: steps of the pursuit, at most; ``projection`` only.
    """

    kind: str = "count"
    ratio: float = 0.05
    keep: float = 0.0
    recovery_steps: int = 5

    name: ClassVar[str] = "sketch"
    summary: ClassVar[str] = "linear sketch, of which the largest entries are recovered"
    reduction: ClassVar[Reduction] = Reduction.LINEAR
    needs_feedback: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise OptionError.unknown("kind", self.kind, KINDS)
        check_ratio(self.ratio)
        if not 0 <= self.keep <= self.ratio:
            raise OptionError(
                f"keep={self.keep}; give the part of the entries to recover, not more than "
                f"ratio={self.ratio}, or 0 for as many as can be told"
            )
        if self.recovery_steps < 1:
            raise OptionError(f"recovery_steps={self.recovery_steps}; give a number from 1 on")

    def payload_bytes(self, unit: Unit, size: int) -> float:
        """Return four bytes for each number of the sketch."""
        return 4 * self._sketch(unit.size, 0).length

    def rounds(
        self, x: Floats, out: Floats, left: Floats | None, state: State, unit: Unit, step: Step
    ) -> Generator[Round, None, None]:
        """Average the sketches, and recover what all ranks recover alike."""
        sketch = self._sketch(len(x), key_of("sketch", step.seed, unit.label, step.number))
        buffer = sketch.encode(x)
        yield Round(buffer, "average")
        if is_finite(buffer):
            # A sample that estimates a threshold must be the same on all ranks.
            scale = sketch.recover(buffer, out, step._replace(rank=0))
            out *= np.float32(min(1.0, max(0.0, scale)))
        else:
            out.fill(np.nan)
        if left is not None:
            np.subtract(x, out, out=left)

    def _sketch(self, size: int, key: int) -> "_Linear":
        keep = self.keep or self.ratio / TOLD[self.kind]
        if self.kind == "count":
            return _Count(size, key, self.ratio, keep)
        return _Projection(size, key, self.ratio, keep, self.recovery_steps)


class _Linear(ABC):
    """A sketch of a gradient of so many entries; the key decides on its random numbers."""

    length: int

    @abstractmethod
    def encode(self, x: Floats) -> Floats:
        """Return the sketch."""

    @abstractmethod
    def recover(self, sketch: Floats, out: Floats, step: Step) -> float:
        """Fill ``out``; return the factor that brings it nearest to what was sketched."""


class _Count(_Linear):
    def __init__(self, size: int, key: int, ratio: float, keep: float):
        self.width = max(1, round(size * ratio / TABLES))
        self.length = TABLES * self.width
        self._run, self._count, self._key = min(RUN, self.width), count_of(size, keep), key
        self._size = size

    @functools.cached_property
    def _starts(self) -> NDArray[np.int64]:
        runs = np.arange(-(-self._size // self._run), dtype=np.uint32)
        keys = (key_of(self._key, table) for table in range(TABLES))
        return np.stack([countsketch.places(key, runs, self.width) for key in keys])

    def encode(self, x: Floats) -> Floats:
        tables = np.zeros((TABLES, self.width + self._run), np.float32)
        countsketch.encode(x, self._starts, self._key, self._run, tables)
        tables[:, : self._run] += tables[:, self.width :]
        return np.ascontiguousarray(tables[:, : self.width]).reshape(-1)

    def recover(self, sketch: Floats, out: Floats, step: Step) -> float:
        rings, starts = sketch.reshape(TABLES, self.width), self._starts
        tables = np.concatenate((rings, rings[:, : self._run]), axis=1)
        countsketch.estimate(tables, starts, self._key, self._run, out)
        chosen = largest(out, None, self._count, True, step)
        out.fill(0)
        out[chosen.indices] = chosen.values
        last = TABLES - 1
        check = countsketch.look_up(
            tables[last], starts[last], self._key, self._run, chosen.indices, last
        )
        values = chosen.values.astype(np.float64)
        return _factor(np.dot(values, check), np.dot(values, values))


class _Projection(_Linear):
    def __init__(self, size: int, key: int, ratio: float, keep: float, steps: int):
        rows = max(2, round(hadamard.BLOCK * ratio))
        self.length = -(-size // hadamard.BLOCK) * rows
        self._keep, self._key, self._steps = count_of(hadamard.BLOCK, keep), key, steps
        order = np.argsort(
            hashed(key_of(key, "rows"), np.arange(hadamard.BLOCK, dtype=np.uint32)), kind="stable"
        )
        self._rows = order[:rows]
        self._fitted = rows - max(1, rows // 8)

    def encode(self, x: Floats) -> Floats:
        sketch = np.empty(self.length, np.float32)
        hadamard.encode(x, self._key, self._rows, sketch)
        return sketch

    def recover(self, sketch: Floats, out: Floats, step: Step) -> float:
        sums = np.zeros(2)
        hadamard.recover(
            sketch,
            self._key,
            self._rows,
            self._fitted,
            self._keep,
            self._steps,
            hadamard.parities(),
            out,
            sums,
        )
        return _factor(sums[0], sums[1])


def _factor(product: float, square: float) -> float:
    return float(product / square) if square > 0 else 0.0
