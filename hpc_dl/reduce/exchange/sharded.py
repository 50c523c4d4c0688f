"""Exchanges in which each rank sums one shard of the bucket, and may owe some of that sum."""

from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np

from hpc_dl.comm.kernels import share
from hpc_dl.compress import Array, Floats
from hpc_dl.compress.residual import Residual
from hpc_dl.reduce.exchange.base import Exchange

#: What a rank sends for values that are not finite: no bytes at all.
NOT_FINITE = np.empty(0, np.uint8)


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

    @contextmanager
    def _owed(self) -> Iterator[Floats | None]:
        """Lend what of the sums was not sent yet, to be changed in place."""
        values = None if self._server is None else self._server.load()
        yield values
        if values is not None:
            values[self._gaps_here] = 0
        if self._server is not None and values is not None:
            self._server.store(values)

    def flush(self, bucket: Floats) -> None:
        """Add both residuals; this rank's part of the average counts for all."""
        super().flush(bucket)
        with self.memory.working():
            if self._server is not None:
                self._repay(bucket, self._server.take() * np.float32(self.comm.size))

    def _repay(self, bucket: Floats, owed: Floats) -> None:
        """Add to a gradient what is owed to this rank's shard."""
        bucket[self._lo : self._hi] += owed

    def _arrays(self) -> dict[str, Array]:
        saved = super()._arrays()
        # That of the shard, at its place in a flat array.
        if self._server is not None:
            whole = np.zeros(self.unit.size, np.float32)
            whole[self._lo : self._hi] = self.memory.to_host(self._server.load())
            saved["server"] = whole
        return saved

    def _take_up(self, saved: dict[str, Array]) -> None:
        super()._take_up(saved)
        if self._server is not None and "server" in saved:
            mine = saved["server"][self._lo : self._hi].astype(np.float32)
            self._server.store(self.memory.from_host(mine))
