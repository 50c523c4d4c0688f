"""Eight or four bits for each value, between the least and the largest of each block."""

from dataclasses import dataclass
from typing import ClassVar

from hpc_dl.compress.blocks import Levels, check_block
from hpc_dl.compress.kernels import levels


class MaxMin(Levels):
    """Evenly spaced levels from the least to the largest value of a block."""

    has_middle: ClassVar[bool] = True
    kind: ClassVar[int] = levels.MIN_MAX
    stochastic: bool

    @property
    def random(self) -> bool:
        """Whether values are rounded at random."""
        return self.stochastic


@dataclass(frozen=True)
class Int8(MaxMin):
    """256 levels between the least and the largest of each ``block`` values.

    Rounds to the nearest level, or with ``stochastic`` up or down at random, which is right
    in the mean. Markov et al., "CGX: adaptive system support for communication-efficient deep
    learning", Middleware 2022.
    """

    block: int = 1024
    stochastic: bool = False

    name: ClassVar[str] = "int8"
    summary: ClassVar[str] = "256 levels between the least and the largest of each 1024"
    width: ClassVar[int] = 8

    def __post_init__(self) -> None:
        check_block(self.block)


@dataclass(frozen=True)
class Int4(MaxMin):
    """16 levels between the least and the largest of each ``block`` values.

    Rounding to the nearest harms at four bits: what it leaves out is kept for the next step,
    unless ``stochastic`` rounding makes it right in the mean. Markov et al., Middleware 2022.
    """

    block: int = 1024
    stochastic: bool = False

    name: ClassVar[str] = "int4"
    summary: ClassVar[str] = "16 levels between the least and the largest of each 1024"
    width: ClassVar[int] = 4

    def __post_init__(self) -> None:
        check_block(self.block)

    @property
    def needs_feedback(self) -> bool:  # type: ignore[override]
        """Whether what rounding leaves out must be kept."""
        return not self.stochastic
