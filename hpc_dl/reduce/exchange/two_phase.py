"""Each rank sums one shard: encoded shards go to it, and its encoded sum goes to all.

Costs 2 (n - 1) / n of the encoded bytes on each rank, like a ring, however many ranks there
are. The sum is encoded too, so the summing rank keeps a residual of its own (Tang et al.,
"DoubleSqueeze", ICML 2019). A shard that is not finite is sent as no bytes at all.
"""

from typing import Any, cast

import numpy as np

from hpc_dl.compress import Array, Codec, Floats, Step
from hpc_dl.compress.kernels.checks import is_finite
from hpc_dl.compress.random import key_of
from hpc_dl.reduce.exchange.sharded import Sharded

_NOT_FINITE = np.empty(0, np.uint8)


class TwoPhase(Sharded):
    """All-to-all of shards, sum, and all-gather."""

    def __init__(self, *args: Any, **options: Any):
        super().__init__(*args, **options)
        self._codec = cast(Codec, self.scheme.compressor)
        self._divide(self._codec.align)

    def _average(self, bucket: Floats, left: Floats | None, step: Step, finite: bool) -> int:
        lo, hi = self._lo, self._hi
        parts = [
            self._encode(bucket[a:b], None if left is None else left[a:b], step, owner)
            if finite and b > a and owner != step.rank
            else _NOT_FINITE
            for owner, (a, b) in enumerate(self._shares)
        ]
        received = self.comm.alltoall(parts)
        mine = bucket[lo:hi]
        if hi > lo:
            reply = self._sum(mine, None if left is None else left[lo:hi], received, step, finite)
        else:
            reply = _NOT_FINITE
        for owner, payload in enumerate(self.comm.allgather(reply)):
            a, b = self._shares[owner]
            if len(payload):
                self._codec.decode(payload, bucket[a:b])
            else:
                bucket[a:b] = np.nan
                if left is not None and len(parts[owner]):
                    self._codec.decode_add(parts[owner], left[a:b])
        return sum(len(part) for part in parts) + (self.comm.size - 1) * len(reply)

    def _encode(self, x: Floats, left: Floats | None, step: Step, owner: int) -> Array:
        key = key_of(step.seed, self.unit.label, step.number, step.rank, owner)
        if left is None:
            return self._codec.encode(x, key)
        return self._codec.encode_with_residual(x, left, key)

    def _sum(
        self, mine: Floats, left: Floats | None, received: list[Array], step: Step, finite: bool
    ) -> Array:
        """Average the shards that came in with this rank's own, which is not encoded."""
        others = [part for rank, part in enumerate(received) if rank != step.rank]
        if not finite or any(len(part) == 0 for part in others):
            return _NOT_FINITE
        if left is not None:
            mine += left
            left.fill(0)
        for part in others:
            self._codec.decode_add(part, mine)
        mine *= np.float32(1 / step.size)
        if not is_finite(mine):  # Finite values have a sum that is not.
            return _NOT_FINITE
        with self._owed() as server:
            return self._encode(mine, server, step, step.size)
