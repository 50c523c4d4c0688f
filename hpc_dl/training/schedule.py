"""How the learning rate of a long training with large batches changes."""

from dataclasses import dataclass
from fractions import Fraction

from hpc_dl.errors import OptionError

#: After these parts of all steps the rate falls to a tenth: epochs 30, 60 and 80 of 90.
FALLS = (Fraction(1, 3), Fraction(2, 3), Fraction(8, 9))


@dataclass(frozen=True)
class WarmupSteps:
    """A factor on the learning rate: a linear rise, then three falls to a tenth.

    Goyal et al., "Accurate, large minibatch SGD: training ImageNet in 1 hour", 2017.

    Args:
        steps: all steps of the training.
        warmup: steps of the rise.
        start: the factor at its begin, for example 1 / ranks.

    >>> schedule = WarmupSteps(steps=90, warmup=4, start=0.5)
    >>> [schedule(step) for step in (0, 2, 4, 30, 60, 89)]
    [0.5, 0.75, 1.0, 0.1, 0.01, 0.001]
    """

    steps: int
    warmup: int
    start: float

    def __post_init__(self) -> None:
        if not 0 <= self.warmup <= self.steps * FALLS[0] or not 0 < self.start <= 1:
            raise OptionError(
                f"a warm-up of {self.warmup} steps of {self.steps} that begins at {self.start:g}: "
                "it must end before a third of all steps, and begin above 0 and not above 1. Warm "
                "up for fewer epochs, or train for more"
            )

    def __call__(self, step: int) -> float:
        """Return the factor in a step, from 0."""
        if step < self.warmup:
            return self.start + (1 - self.start) * step / self.warmup
        fallen = sum(step >= part * self.steps for part in FALLS)
        return float(Fraction(1, 10**fallen))
