"""Exchanges in which each rank sums one shard of the bucket, and may owe some of that sum."""

from collections.abc import Callable

import numpy as np

from hpc_dl.comm.kernels import share
from hpc_dl.compress import Array, Floats
from hpc_dl.compress.residual import Residual
from hpc_dl.reduce.exchange.base import Exchange, Kept

#: What a rank sends where it has nothing, or what is not finite: no bytes at all.
NOTHING = np.empty(0, np.uint8)


class Sharded(Exchange):
    """Keeps what of the sums of this rank's shard was not sent to all."""

    _shares: list[tuple[int, int]]
    _server: Residual | None

    def _divide(self, align: int = 1) -> None:
        size = self.comm.size
        self._shares = [share(self.unit.size, rank, size, align) for rank in range(size)]
        self._lo, self._hi = self._shares[self.comm.rank]
        self._server = self.memory.residual(self.scheme.residual, self._hi - self._lo)
        here = (self._lo <= self._gaps) & (self._gaps < self._hi)
        self._gaps_here = self.memory.from_host(self._gaps[here] - self._lo)

    def _in_two_phases(
        self, parts: list[Array], finite: bool, add_up: Callable[[list[Array]], Array]
    ) -> tuple[list[Array], int, bool]:
        """Send each rank its part, and all ranks what ``add_up`` makes of those that come here.

        Args:
            parts: by rank; this rank's own may be ``NOTHING``. Where not ``finite``, all are.
            add_up: is called if no other rank has sent ``NOTHING``; returns ``NOTHING`` for a
                sum that is not finite.

        Returns:
            The sums by rank, the bytes sent, and whether all sums are there.
        """
        rank = self.comm.rank
        received = self.comm.alltoall(parts)
        there = all(len(part) for other, part in enumerate(received) if other != rank)
        reply = add_up(received) if finite and there and self._hi > self._lo else NOTHING
        sums = self.comm.allgather(reply)
        sent = sum(len(part) for other, part in enumerate(parts) if other != rank)
        complete = all(len(part) for (a, b), part in zip(self._shares, sums, strict=True) if b > a)
        return sums, sent + (self.comm.size - 1) * len(reply), complete

    def _begin(self, owes: bool) -> Kept:
        kept = super()._begin(owes)
        if not owes or self._server is None:
            return kept
        return kept._replace(server=self._server.load())

    def _keep(self, kept: Kept) -> None:
        super()._keep(kept)
        if self._server is not None and kept.server is not None:
            kept.server[self._gaps_here] = 0
            self._server.store(kept.server)

    def _pay(self, bucket: Floats, kept: Kept) -> None:
        """Add both residuals; this rank's part of the average counts for all."""
        super()._pay(bucket, kept)
        if kept.server is not None:
            self._repay(bucket, kept.server, slice(self._lo, self._hi))
            kept.server[:] = 0

    def _repay(self, bucket: Floats, owed: Floats, place: slice) -> None:
        """Add to a gradient what is owed of sums; this rank's gradient is one of those averaged."""
        bucket[place] += owed * np.float32(self.comm.size)

    def _arrays(self) -> dict[str, Array]:
        saved = super()._arrays()
        # That of the shard, at its place in a flat array.
        if self._server is not None:
            whole = np.zeros(self.unit.size, np.float32)
            whole[self._lo : self._hi] = self.memory.to_host(self._server.load())
            saved["server"] = whole
        return saved

    def _load(self, saved: dict[str, Array]) -> None:
        """Take up a state; what is owed of sums that other ranks make now is part of the rest."""
        super()._load(saved)
        if self._server is None or self.residual is None or "server" not in saved:
            return
        here = slice(self._lo, self._hi)
        whole = self.memory.from_host(saved["server"].astype(np.float32))
        self._server.store(self.memory.copy(whole[here]))
        whole[here] = 0
        if whole.any():
            rest = self.residual.load()
            self._repay(rest, whole, slice(None))
            self.residual.store(rest)

    def own_part(self, offset: int, values: Array) -> Array:
        """Return what is owed of sums, at ``offset`` of the unit, without other ranks' shards."""
        places = np.arange(offset, offset + len(values))
        return np.where((self._lo <= places) & (places < self._hi), values, 0)
