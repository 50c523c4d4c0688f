"""Exchange of selected entries: by all-gather, or in two phases where there are many ranks.

All-gather costs (n - 1) times the entries of one rank. Where that is more than a float16
all-reduce, entries go to the rank that sums their shard, which selects again and sends its
selection to all, with a residual of its own (after Li and Hoefler, "Near-optimal sparse
allreduce", PPoPP 2022).
"""

import functools
from typing import Any, cast

import numpy as np

from hpc_dl.comm import Op
from hpc_dl.compress import Array, Floats, Sparse, Sparsifier, State, Step
from hpc_dl.compress.kernels.topk import scatter_add
from hpc_dl.compress.topk import largest
from hpc_dl.reduce.exchange.base import Kept
from hpc_dl.reduce.exchange.sharded import NOTHING, Sharded

#: Ranks times density above which gathering costs more than a float16 all-reduce.
DENSE_ABOVE = 0.5


def pack(entries: Sparse) -> Array:
    """Return the bytes of entries: their number, indices and values."""
    count = np.array([len(entries.indices)], np.int32)
    parts = [count.view(np.uint8), entries.indices.view(np.uint8), entries.values.view(np.uint8)]
    return np.concatenate(parts)


def unpack(payload: Array) -> Sparse:
    """Return the entries of ``pack``."""
    count = int(payload[:4].view(np.int32)[0])
    return Sparse(
        payload[4 : 4 + 4 * count].view(np.int32), payload[4 + 4 * count :].view(np.float32)
    )


class Gather(Sharded):
    """Sums what the ranks select."""

    def __init__(self, *args: Any, **options: Any):
        super().__init__(*args, **options)
        self._sparsifier = cast(Sparsifier, self.scheme.compressor)
        self._divide()
        self._owes_of_sums = False

    def _average(self, bucket: Floats, kept: Kept, step: Step, finite: bool) -> tuple[int, bool]:
        chosen = self._select(bucket, kept.left, kept.state, step) if finite else None
        total = self.memory.zeros(len(bucket))
        summed = self.comm.size * self._density(chosen, step) > DENSE_ABOVE
        if summed:
            sent, complete = self._two_phase(total, kept, chosen, step)
        else:
            sent, complete = self._gather(total, chosen)
        if not complete:
            return sent, False
        self._restore(total, bucket)
        if not self.memory.is_finite(bucket):
            return sent, False
        if not summed:
            self._settle(kept)
        self._owes_of_sums = summed
        if kept.velocity is not None and chosen is not None:
            kept.velocity[self.memory.from_host(chosen.indices)] = 0
        return sent, True

    def _own(self, whole: Floats, step: Step) -> Floats:
        state = {key: value.copy() for key, value in self.state.items()}
        out: Floats = self.memory.zeros(len(whole))
        total = self.memory.zeros(len(whole))
        self._add(pack(self._select(whole, None, state, step)), total)
        self._restore(total, out)
        return out

    def _settle(self, kept: Kept) -> None:
        """Take over what is owed of sums: entries that are gathered are not summed here."""
        if self._owes_of_sums and kept.left is not None and kept.server is not None:
            self._repay(kept.left, kept.server, slice(self._lo, self._hi))
            kept.server[:] = 0

    def _load(self, saved: dict[str, Array]) -> None:
        super()._load(saved)
        self._owes_of_sums = True  # perhaps: of a run that summed here

    def _repay(self, bucket: Floats, owed: Floats, place: slice) -> None:
        """Add what is owed; like what is selected, it may be coefficients."""
        total, gradient = self.memory.zeros(len(bucket)), self.memory.zeros(len(bucket))
        total[place] = owed * np.float32(self.comm.size)
        self._restore(total, gradient)
        bucket += gradient

    def _select(self, bucket: Floats, left: Floats | None, state: State, step: Step) -> Sparse:
        if left is None:
            return self._sparsifier.select(bucket, state, self.unit, step)
        return self._sparsifier.select_with_residual(bucket, left, state, self.unit, step)

    def _restore(self, total: Floats, out: Floats) -> None:
        self._sparsifier.restore(total, out, self.unit)

    def _add(self, part: Array, out: Floats) -> None:
        scatter_add(*unpack(part), out)

    def _largest(self, mine: Floats, server: Floats | None, count: int, step: Step) -> Sparse:
        return largest(mine, server, count, False, step)

    def _density(self, chosen: Sparse | None, step: Step) -> float:
        """Return the part of the entries that a rank sends, the same on all ranks."""
        if self._sparsifier.fixed:
            return self._sparsifier.density(self.unit, step)
        count = np.array([0 if chosen is None else len(chosen.indices)], np.int64)
        self.comm.allreduce(count, Op.SUM)
        return float(count[0]) / (self.comm.size * self.unit.size)

    def _gather(self, total: Floats, chosen: Sparse | None) -> tuple[int, bool]:
        """Average the selections of all ranks; return bytes sent, and whether all were finite."""
        payload = NOTHING if chosen is None else pack(chosen)
        everyone = self.comm.allgather(payload)
        complete = all(len(part) for part in everyone)
        if complete:
            for part in everyone:
                self._add(part, total)
            total *= np.float32(1 / self.comm.size)
        return (self.comm.size - 1) * len(payload), complete

    def _two_phase(
        self, total: Floats, kept: Kept, chosen: Sparse | None, step: Step
    ) -> tuple[int, bool]:
        add_up = functools.partial(self._sum, total[self._lo : self._hi], kept.server, step)
        sums, sent, complete = self._in_two_phases(self._split(chosen), chosen is not None, add_up)
        if complete:
            for (lo, hi), part in zip(self._shares, sums, strict=True):
                if hi > lo:
                    self._add(part, total[lo:hi])
        return sent, complete

    def _sum(self, mine: Floats, server: Floats | None, step: Step, received: list[Array]) -> Array:
        """Average the entries of this rank's shard, and select of them; ``mine`` stays zero."""
        for part in received:
            self._add(part, mine)
        mine *= np.float32(1 / self.comm.size)
        if not self.memory.is_finite(mine):
            return NOTHING
        reply = pack(self._select_again(mine, server, step))
        mine[:] = 0
        return reply

    def _split(self, chosen: Sparse | None) -> list[Array]:
        if chosen is None:
            return [NOTHING] * self.comm.size
        parts = []
        for lo, hi in self._shares:
            a, b = np.searchsorted(chosen.indices, [lo, hi])
            indices = chosen.indices[a:b] - np.int32(lo)
            parts.append(pack(Sparse(indices, chosen.values[a:b])))
        return parts

    def _select_again(self, mine: Floats, server: Floats | None, step: Step) -> Sparse:
        """Select of a summed shard as many entries as one rank sent for it, about."""
        density = self._sparsifier.density(self.unit, step) if self._sparsifier.fixed else 1.0
        count = min(len(mine), max(1, round(len(mine) * density)))
        return self._largest(mine, server, count, step)
