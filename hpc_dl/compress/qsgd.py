"""A few levels on both sides of zero, rounded at random."""

from dataclasses import dataclass
from typing import ClassVar

from hpc_dl.compress.blocks import Levels, check_block
from hpc_dl.compress.kernels import levels
from hpc_dl.errors import OptionError

_NORMS = {"max": levels.MAX, "l2": levels.L2}
_WIDTHS = (2, 4, 8)


@dataclass(frozen=True)
class Qsgd(Levels):
    """Sign and level, ``bits`` together, in parts of each block's norm; right in the mean.

    Four bits are 7 levels on both sides of zero. ``norm=max`` has the smaller error;
    ``norm=l2`` is the paper's, and rounds most values to zero. Alistarh et al., "QSGD:
    communication-efficient SGD via gradient quantization and encoding", NeurIPS 2017.
    """

    bits: int = 4
    norm: str = "max"
    block: int = 1024

    name: ClassVar[str] = "qsgd"
    summary: ClassVar[str] = "sign and level, rounded at random, in 2, 4 or 8 bits"
    has_middle: ClassVar[bool] = False
    random: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if self.bits not in _WIDTHS:
            raise OptionError.unknown("bits", self.bits, _WIDTHS)
        if self.norm not in _NORMS:
            raise OptionError.unknown("norm", self.norm, _NORMS)
        check_block(self.block)

    @property
    def width(self) -> int:
        """Bits for each value."""
        return self.bits

    @property
    def kind(self) -> int:
        """Return the kernel's number of the norm."""
        return _NORMS[self.norm]
