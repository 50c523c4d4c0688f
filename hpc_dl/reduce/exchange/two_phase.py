"""Each rank sums one shard: encoded shards go to it, and its encoded sum goes to all.

Costs 2 (n - 1) / n of the encoded bytes on each rank, like a ring, however many ranks there
are. The sum is encoded too, so the summing rank keeps a residual of its own (Tang et al.,
"DoubleSqueeze", ICML 2019). A shard that is not finite is sent as no bytes at all.
"""

from typing import Any, cast

import numpy as np

from hpc_dl.compress import Array, Codec, Floats, Step
from hpc_dl.compress.random import key_of
from hpc_dl.reduce.exchange.sharded import NOT_FINITE, Sharded


class TwoPhase(Sharded):
    """All-to-all of shards, sum, and all-gather."""

    def __init__(self, *args: Any, **options: Any):
        super().__init__(*args, **options)
        self._codec = cast(Codec, self.scheme.compressor)
        self._divide(self._codec.align)

    def _average(self, bucket: Floats, left: Floats | None, step: Step, finite: bool) -> int:
        lo, hi = self._lo, self._hi
        parts = [NOT_FINITE] * len(self._shares)
        if finite:
            self._encode_shards(bucket, left, step, parts)
        received = self.comm.alltoall(parts)
        mine = bucket[lo:hi]
        if hi > lo:
            reply = self._sum(mine, None if left is None else left[lo:hi], received, step, finite)
        else:
            reply = NOT_FINITE
        replies = self.comm.allgather(reply)
        self._decode_shards(replies, bucket)
        for (a, b), payload, part in zip(self._shares, replies, parts, strict=True):
            if len(payload) == 0:
                bucket[a:b] = np.nan
                if left is not None and len(part):
                    self._decode_add(part, left[a:b])
        return sum(len(part) for part in parts) + (self.comm.size - 1) * len(reply)

    def _encode_shards(
        self, bucket: Floats, left: Floats | None, step: Step, parts: list[Array]
    ) -> None:
        """Encode what the other ranks sum into ``parts``; empty shards stay as they are."""
        for owner, (a, b) in enumerate(self._shares):
            if b > a and owner != step.rank:
                rest = None if left is None else left[a:b]
                parts[owner] = self._encode(bucket[a:b], rest, self._key(step, owner))

    def _decode_shards(self, payloads: list[Array], bucket: Floats) -> None:
        """Write the sums that came; those without bytes stay as they are."""
        for (a, b), payload in zip(self._shares, payloads, strict=True):
            if len(payload):
                self._codec.decode(payload, bucket[a:b])

    def _decode_add(self, payload: Array, out: Floats) -> None:
        self._codec.decode_add(payload, out)

    def _key(self, step: Step, owner: int) -> int:
        return key_of(step.seed, self.unit.label, step.number, step.rank, owner)

    def _encode(self, x: Floats, left: Floats | None, key: int) -> Array:
        if left is None:
            return self._codec.encode(x, key)
        return self._codec.encode_with_residual(x, left, key)

    def _sum(
        self, mine: Floats, left: Floats | None, received: list[Array], step: Step, finite: bool
    ) -> Array:
        """Average the shards that came in with this rank's own, encoded only for a vote."""
        others = [part for rank, part in enumerate(received) if rank != step.rank]
        if not finite or any(len(part) == 0 for part in others):
            return NOT_FINITE
        if self._codec.votes:
            own = self._encode(mine, left, self._key(step, step.rank))
            mine[:] = 0
            self._decode_add(own, mine)
        elif left is not None:
            mine += left
            left[:] = 0
        for part in others:
            self._decode_add(part, mine)
        mine *= np.float32(1 / step.size)
        if not self.memory.is_finite(mine):  # Finite values have a sum that is not.
            return NOT_FINITE
        with self._owed() as server:
            return self._encode(mine, server, self._key(step, step.size))
