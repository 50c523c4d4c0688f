"""The entries above a given magnitude."""

import math
from dataclasses import dataclass
from typing import ClassVar

from hpc_dl.compress.base import Floats, Sparse, Sparsifier, State, Step, Unit
from hpc_dl.compress.topk import above, count_of
from hpc_dl.errors import OptionError

#: The part of the entries that is taken for granted where the data are not known.
NOMINAL = 0.01


@dataclass(frozen=True)
class Threshold(Sparsifier):
    """Every entry whose magnitude, with what is left of the steps before, reaches ``value``.

    How many there are depends on the data, so the ranks agree on the number in each step.
    Strom, "Scalable distributed DNN training using commodity GPU cloud computing",
    Interspeech 2015 (which sends one bit for a value; this sends the value); Dutta et al.,
    "On the discrepancy between the theoretical analysis and practical implementations of
    compressed communication", AAAI 2020.
    """

    value: float = 1e-3

    name: ClassVar[str] = "threshold"
    summary: ClassVar[str] = "entries of at least a given magnitude"
    fixed: ClassVar[bool] = False

    def __post_init__(self) -> None:
        if not 0 < self.value < math.inf:
            raise OptionError(f"value={self.value}; give the least magnitude to send, above 0")

    def payload_bytes(self, unit: Unit, size: int) -> float:
        """Return an int32 and a float32 for one entry of 100; really the data decide."""
        return 8 * count_of(unit.size, NOMINAL)

    def select(self, x: Floats, state: State, unit: Unit, step: Step) -> Sparse:
        """Select from ``x``."""
        return above(x, None, self.value, len(x))

    def select_with_residual(
        self, x: Floats, left: Floats, state: State, unit: Unit, step: Step
    ) -> Sparse:
        """Select from ``x + left``; ``left`` becomes the rest."""
        return above(x, left, self.value, len(x))
