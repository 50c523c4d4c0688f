"""The entries of largest magnitude."""

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from hpc_dl.compress.base import Floats, Sparse, Sparsifier, State, Step, Unit
from hpc_dl.compress.kernels import topk
from hpc_dl.compress.random import key_of
from hpc_dl.errors import OptionError

#: Entries that are looked at to estimate the threshold.
SAMPLE = 1 << 14
#: Zeros are never sent, even where most of a gradient is zero.
TINY = float(np.finfo(np.float32).tiny)
_NOTHING = np.empty(0, np.float32)


def check_ratio(ratio: float) -> None:
    """Refuse what is no part of a whole.

    Raises:
        OptionError: not above 0, or above 1.
    """
    if not 0 < ratio <= 1:
        raise OptionError(f"ratio={ratio}; give the part of the entries to send, above 0 up to 1")


@dataclass(frozen=True)
class TopK(Sparsifier):
    """The ``ratio`` of entries with the largest magnitude in each bucket.

    ``sample=true`` finds candidates with a threshold estimated from a sample, in one pass over
    the gradient, and sorts only those. Aji and Heafield, "Sparse communication for
    distributed gradient descent", EMNLP 2017; sampling: Lin et al., ICLR 2018.
    """

    ratio: float = 0.01
    sample: bool = True

    name: ClassVar[str] = "topk"
    summary: ClassVar[str] = "entries of largest magnitude"

    def __post_init__(self) -> None:
        check_ratio(self.ratio)

    def payload_bytes(self, unit: Unit, size: int) -> float:
        """Return an int32 and a float32 for each entry."""
        return 8 * count_of(unit.size, self.ratio)

    def select(self, x: Floats, state: State, unit: Unit, step: Step) -> Sparse:
        """Select from ``x``."""
        return largest(x, None, count_of(len(x), self.ratio), self.sample, step)

    def select_with_residual(
        self, x: Floats, left: Floats, state: State, unit: Unit, step: Step
    ) -> Sparse:
        """Select from ``x + left``; ``left`` becomes the rest."""
        return largest(x, left, count_of(len(x), self.ratio), self.sample, step)


def count_of(size: int, ratio: float) -> int:
    """Return how many of ``size`` entries are sent: one at least."""
    return min(size, max(1, round(size * ratio)))


def largest(x: Floats, left: Floats | None, count: int, sample: bool, step: Step) -> Sparse:
    """Select the ``count`` largest entries.

    Args:
        left: error feedback: select from ``x + left``, which becomes the rest.
        sample: find candidates with an estimated threshold, in one pass, and sort only those.
            Fewer are selected in the rare case that there are too few candidates.
    """
    if sample and is_sampled(len(x), count):
        wanted = with_margin(len(x), count)
        candidates = above(x, left, _sampled(x, left, wanted, step), 2 * wanted)
        return _largest_of(candidates, left, count)
    if left is not None:
        left += x
        x = left
    magnitudes = np.abs(x)
    kept = magnitudes > 0
    if count < len(x):
        kept &= _mask_of_largest(magnitudes, count)
    chosen = np.flatnonzero(kept)
    values = x[chosen]
    if left is not None:
        left[chosen] = 0
    return Sparse(chosen.astype(np.int32, copy=False), values)


def is_sampled(size: int, count: int) -> bool:
    """Tell whether so many entries are enough for a sample to say which are large."""
    return size > 4 * SAMPLE and count < size // 4


def with_margin(size: int, count: int) -> int:
    """Return how many candidates to look for.

    The sample holds few entries above a threshold, so their number is off by about the root of
    it; four times that is never off, for all that matters.
    """
    margin = 1 + 4 * (count * SAMPLE / size) ** -0.5
    return min(size, int(count * margin) + 1)


def offset_of(size: int, step: Step) -> int:
    """Return the first entry of the sample."""
    return key_of("topk", step.seed, step.number, step.rank) % (size // SAMPLE)


def _largest_of(candidates: Sparse, left: Floats | None, count: int) -> Sparse:
    """Keep the ``count`` largest; the others go back to ``left``."""
    indices, values = candidates
    if len(values) <= count:
        return candidates
    kept = _mask_of_largest(np.abs(values), count)
    if left is not None:
        left[indices[~kept]] = values[~kept]
    return Sparse(indices[kept], values[kept])


def _mask_of_largest(magnitudes: Floats, count: int) -> NDArray[np.bool_]:
    """Tell which are the ``count`` largest; of equal ones those that come first."""
    surplus = len(magnitudes) - count
    threshold = np.partition(magnitudes, surplus)[surplus]
    kept: NDArray[np.bool_] = magnitudes >= threshold
    equal = np.flatnonzero(magnitudes == threshold)  # of these perhaps not all
    kept[equal[len(equal) - (np.count_nonzero(kept) - count) :]] = False
    return kept


def above(x: Floats, left: Floats | None, threshold: float, room: int) -> Sparse:
    """Select entries of at least a threshold, the first ``room`` of them."""
    indices, values = np.empty(room, np.int32), np.empty(room, np.float32)
    bound = np.float32(max(threshold, TINY))
    memory = _NOTHING if left is None else left
    found = topk.select(x, memory, left is not None, bound, indices, values, True)
    return Sparse(indices[:found].copy(), values[:found].copy())


def _sampled(x: Floats, left: Floats | None, count: int, step: Step) -> float:
    """Estimate the magnitude of the ``count``-th largest entry."""
    stride = len(x) // SAMPLE
    start = offset_of(len(x), step)
    sample = x[start::stride] if left is None else x[start::stride] + left[start::stride]
    sample = np.abs(sample)
    wanted = max(1, round(len(sample) * count / len(x)))
    return float(np.partition(sample, len(sample) - wanted)[len(sample) - wanted])
