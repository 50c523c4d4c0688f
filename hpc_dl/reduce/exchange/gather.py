"""Exchange of selected entries: by all-gather, or in two phases where there are many ranks.

All-gather costs (n - 1) times the entries of one rank. Where that is more than a float16
all-reduce, entries go to the rank that sums their shard, which selects again and sends its
selection to all, with a residual of its own (after Li and Hoefler, "Near-optimal sparse
allreduce", PPoPP 2022).
"""

from typing import Any, cast

import numpy as np

from hpc_dl.comm import Op
from hpc_dl.compress import Array, Floats, Sparse, Sparsifier, Step
from hpc_dl.compress.kernels.topk import scatter_add
from hpc_dl.compress.topk import largest
from hpc_dl.reduce.exchange.sharded import NOT_FINITE, Sharded

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
        self._owes_of_sums = True  # what is loaded may be of a run that summed here

    def _average(self, bucket: Floats, left: Floats | None, step: Step, finite: bool) -> int:
        chosen = self._select(bucket, left, step) if finite else None
        bucket[:] = 0
        if self.comm.size * self._density(chosen, step) > DENSE_ABOVE:
            sent, complete = self._two_phase(bucket, chosen, step)
            self._owes_of_sums = True
        else:
            sent, complete = self._gather(bucket, chosen)
            self._settle(left)
        if complete and self.memory.is_finite(bucket):
            self._restore(self.memory.copy(bucket), bucket)
            if self.momentum is not None and chosen is not None:
                self.momentum[self.memory.from_host(chosen.indices)] = 0
        else:
            bucket[:] = np.nan
            if chosen is not None and left is not None:
                self._give_back(chosen, left)
        return sent

    def _settle(self, left: Floats | None) -> None:
        """Take over what is owed of sums: entries that are gathered are not summed here."""
        if self._owes_of_sums and left is not None and self._server is not None:
            self._repay(left, self._server.take() * np.float32(self.comm.size))
        self._owes_of_sums = False

    def _repay(self, bucket: Floats, owed: Floats) -> None:
        """Add what is owed; like what is selected, it may be coefficients."""
        total, gradient = self.memory.zeros(len(bucket)), self.memory.zeros(len(bucket))
        total[self._lo : self._hi] = owed
        self._restore(total, gradient)
        bucket += gradient

    def _select(self, bucket: Floats, left: Floats | None, step: Step) -> Sparse:
        if left is None:
            return self._sparsifier.select(bucket, self.state, self.unit, step)
        return self._sparsifier.select_with_residual(bucket, left, self.state, self.unit, step)

    def _restore(self, total: Floats, out: Floats) -> None:
        self._sparsifier.restore(total, out, self.unit)

    def _give_back(self, chosen: Sparse, left: Floats) -> None:
        self._sparsifier.give_back(chosen, left, self.unit)

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

    def _gather(self, bucket: Floats, chosen: Sparse | None) -> tuple[int, bool]:
        """Sum the selections of all ranks; return bytes sent, and whether all were finite."""
        payload = NOT_FINITE if chosen is None else pack(chosen)
        everyone = self.comm.allgather(payload)
        for part in everyone:
            if len(part):
                self._add(part, bucket)
        bucket *= np.float32(1 / self.comm.size)
        return (self.comm.size - 1) * len(payload), all(len(part) for part in everyone)

    def _two_phase(self, bucket: Floats, chosen: Sparse | None, step: Step) -> tuple[int, bool]:
        parts = self._split(chosen)
        received = self.comm.alltoall(parts)
        mine = bucket[self._lo : self._hi]
        for part in received:
            if len(part):
                self._add(part, mine)
        mine *= np.float32(1 / self.comm.size)
        complete = all(len(part) for part in received) and self.memory.is_finite(mine)
        reply = pack(self._select_again(mine, step)) if complete else NOT_FINITE
        everyone = self.comm.allgather(reply)
        mine[:] = 0
        for (lo, hi), part in zip(self._shares, everyone, strict=True):
            if len(part):
                self._add(part, bucket[lo:hi])
        sent = sum(len(part) for rank, part in enumerate(parts) if rank != step.rank)
        return sent + (self.comm.size - 1) * len(reply), all(len(part) for part in everyone)

    def _split(self, chosen: Sparse | None) -> list[Array]:
        if chosen is None:
            return [NOT_FINITE] * self.comm.size
        parts = []
        for lo, hi in self._shares:
            a, b = np.searchsorted(chosen.indices, [lo, hi])
            indices = chosen.indices[a:b] - np.int32(lo)
            parts.append(pack(Sparse(indices, chosen.values[a:b])))
        return parts

    def _select_again(self, mine: Floats, step: Step) -> Sparse:
        """Select of a summed shard as many entries as one rank sent for it, about."""
        if len(mine) == 0:
            return Sparse(np.empty(0, np.int32), np.empty(0, np.float32))
        density = self._sparsifier.density(self.unit, step) if self._sparsifier.fixed else 1.0
        count = min(len(mine), max(1, round(len(mine) * density)))
        with self._owed() as server:
            return self._largest(mine, server, count, step)
