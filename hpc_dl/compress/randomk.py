"""Random entries, the same on all ranks."""

from collections.abc import Generator
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from hpc_dl.compress.base import AllReduced, Floats, Reduction, Round, State, Step, Unit
from hpc_dl.compress.random import hashed, key_of
from hpc_dl.compress.topk import check_ratio, count_of

#: Most entries that are drawn together: four cache lines.
RUN = 64
#: Fewest runs that are drawn, where there are entries enough.
FEWEST = 16


@dataclass(frozen=True)
class RandomK(AllReduced):
    """The same random entries of all ranks, so all-reduce sums them and no index travels.

    Runs of up to 64 entries are drawn, so that memory is read by cache lines; one run from
    each of equal parts of the gradient, so that a hash gives them sorted and without
    repetition. Each entry is as likely as any other. Konecny et al., "Federated learning:
    strategies for improving communication efficiency", 2016; with error feedback: Stich et
    al., "Sparsified SGD with memory", NeurIPS 2018.

    Args:
        ratio: the part of the entries to send.
        scale: divide by that part, which makes the average unbiased. Not with error
            feedback, which makes up for the rest itself.
    """

    ratio: float = 0.01
    scale: bool = False

    name: ClassVar[str] = "randomk"
    summary: ClassVar[str] = "the same random entries of all ranks, without indices"
    reduction: ClassVar[Reduction] = Reduction.LINEAR

    def __post_init__(self) -> None:
        check_ratio(self.ratio)

    @property
    def needs_feedback(self) -> bool:  # type: ignore[override]
        """Whether what is not drawn must be kept."""
        return not self.scale

    def payload_bytes(self, unit: Unit, size: int) -> float:
        """Return four bytes for each entry of the runs, which are padded at the end."""
        run, count, _ = self._runs(unit.size)
        return 4 * run * count

    def rounds(
        self, x: Floats, out: Floats, left: Floats | None, state: State, unit: Unit, step: Step
    ) -> Generator[Round, None, None]:
        """Average what was drawn."""
        run, count, total = self._runs(len(x))
        drawn = draw(key_of("randomk", step.seed, unit.label, step.number), count, total)
        # Sorted: the last run of all, which may be short, can only be the last one drawn.
        whole = len(x) // run
        full = drawn[drawn < whole]
        short = slice(whole * run, len(x) if len(full) < count else whole * run)

        buffer = np.zeros((count, run), np.float32)
        tail = buffer[-1, : short.stop - short.start]
        np.take(_runs_of(x, run), full, axis=0, out=buffer[: len(full)])
        tail[:] = x[short]
        yield Round(buffer.reshape(-1), "average")
        if self.scale and left is None:
            buffer *= np.float32(total / count)
        out.fill(0)
        _runs_of(out, run)[full] = buffer[: len(full)]
        out[short] = tail
        if left is not None:
            np.copyto(left, x)
            _runs_of(left, run)[full] = 0
            left[short] = 0

    def _runs(self, size: int) -> tuple[int, int, int]:
        """Return the entries of a run, how many runs are drawn, and of how many."""
        wanted = count_of(size, self.ratio)
        run = min(RUN, max(1, wanted // FEWEST))
        total = -(-size // run)
        return run, min(total, -(-wanted // run)), total


def _runs_of(flat: Floats, run: int) -> Floats:
    whole = len(flat) // run
    return flat[: whole * run].reshape(whole, run)


def draw(key: int, count: int, total: int) -> NDArray[np.int64]:
    """Draw ``count`` of ``total`` numbers, sorted, each with the same probability.

    The numbers, as a ring that is turned at random, are cut into ``count`` parts, as equal as
    can be, and one is drawn from each.
    """
    bounds = np.arange(count + 1, dtype=np.int64) * total // count
    random = hashed(key, np.arange(count + 1, dtype=np.uint32)).astype(np.uint64)
    widths = np.append(np.diff(bounds), total).astype(np.uint64)
    offsets = (random * widths >> np.uint64(32)).astype(np.int64)
    return np.sort((bounds[:-1] + offsets[:-1] + offsets[-1]) % total)
