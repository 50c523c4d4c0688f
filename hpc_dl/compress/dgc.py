"""Deep gradient compression."""

import math
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from hpc_dl.compress.base import Floats, Sparse, Sparsifier, State, Step, Unit
from hpc_dl.compress.topk import check_ratio, count_of, largest
from hpc_dl.errors import OptionError

#: Stages of the ramp; each sends a quarter of the one before.
STAGES = 4


@dataclass(frozen=True)
class Dgc(Sparsifier):
    """Entries of largest magnitude, with momentum taken before they are selected.

    The optimizer must have no momentum of its own: what waits is velocity, and entries that
    were sent start again without it. Lin et al., "Deep gradient compression", ICLR 2018.

    Args:
        ratio: the part of the entries to send.
        momentum: of the velocity.
        ramp: steps at the beginning in which 25 %, 6.25 %, 1.6 % and 0.4 % are sent, a
            quarter of the steps each, where that is more than ``ratio``.
        clip: largest norm of a bucket's average gradient, 0 for any. Each rank clips its own
            at the square root of the number of ranks below, before it is added to what waits.
    """

    ratio: float = 0.001
    momentum: float = 0.9
    ramp: int = 0
    clip: float = 0.0

    name: ClassVar[str] = "dgc"
    summary: ClassVar[str] = "entries of largest velocity; momentum before compression"

    def __post_init__(self) -> None:
        check_ratio(self.ratio)
        if not 0 <= self.momentum < 1:
            raise OptionError(f"momentum={self.momentum}; give a number from 0 to below 1")
        if self.ramp < 0:
            raise OptionError(f"ramp={self.ramp}; give a number of steps, 0 or more")
        if not 0 <= self.clip < math.inf:
            raise OptionError(f"clip={self.clip}; give a norm, or 0 for no clipping")

    @property
    def default_momentum(self) -> float:
        """Momentum correction belongs to it."""
        return self.momentum

    def payload_bytes(self, unit: Unit, size: int) -> float:
        """Return an int32 and a float32 for each entry, after the ramp."""
        return 8 * count_of(unit.size, self.ratio)

    def density(self, unit: Unit, step: Step) -> float:
        """Return the part of the entries that is sent in this step, about."""
        return self.count(unit.size, step) / max(unit.size, 1)

    def prepare(self, gradient: Floats, size: int) -> None:
        """Clip the norm."""
        if self.clip:
            norm = _norm(gradient)
            limit = self.clip / math.sqrt(size)
            if norm > limit:
                gradient *= np.float32(limit / norm)

    def select(self, x: Floats, state: State, unit: Unit, step: Step) -> Sparse:
        """Select from ``x``."""
        return largest(x, None, self.count(len(x), step), True, step)

    def select_with_residual(
        self, x: Floats, left: Floats, state: State, unit: Unit, step: Step
    ) -> Sparse:
        """Select from ``x + left``; ``left`` becomes the rest."""
        return largest(x, left, self.count(len(x), step), True, step)

    def count(self, size: int, step: Step) -> int:
        """Return how many of ``size`` entries are sent in this step."""
        ratio = self.ratio
        if step.number < self.ramp:
            stage = step.number * STAGES // self.ramp
            ratio = max(ratio, 0.25 ** (stage + 1))
        return count_of(size, ratio)


def _norm(x: Floats) -> float:
    with np.errstate(over="ignore", under="ignore"):
        squared = float(np.dot(x, x))
    if 1e-30 < squared < math.inf:
        return math.sqrt(squared)
    return math.sqrt(float(np.square(x, dtype=np.float64).sum()))
