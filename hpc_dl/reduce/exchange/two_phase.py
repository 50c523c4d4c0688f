"""Each rank sums one shard: encoded shards go to it, and its encoded sum goes to all.

Costs 2 (n - 1) / n of the encoded bytes on each rank, like a ring, however many ranks there
are. The sum is encoded too, so the summing rank keeps a residual of its own (Tang et al.,
"DoubleSqueeze", ICML 2019). A shard that is not finite is sent as no bytes at all.
"""

import functools
from typing import Any, cast

import numpy as np

from hpc_dl.compress import Array, Codec, Floats, Step
from hpc_dl.compress.random import key_of
from hpc_dl.reduce.exchange.base import Kept
from hpc_dl.reduce.exchange.sharded import NOTHING, Sharded


class TwoPhase(Sharded):
    """All-to-all of shards, sum, and all-gather."""

    def __init__(self, *args: Any, **options: Any):
        super().__init__(*args, **options)
        self._codec = cast(Codec, self.scheme.compressor)
        self._divide(self._codec.align)

    def _average(self, bucket: Floats, kept: Kept, step: Step, finite: bool) -> tuple[int, bool]:
        parts = [NOTHING] * len(self._shares)
        if finite:
            self._encode_shards(bucket, kept.left, step, parts)
        add_up = functools.partial(self._sum, bucket, kept, step)
        sums, sent, complete = self._in_two_phases(parts, finite, add_up)
        if complete:
            self._decode_shards(sums, bucket)
        return sent, complete

    def _own(self, whole: Floats, step: Step) -> Floats:
        out: Floats = self.memory.zeros(len(whole))
        parts = [
            self._encode(whole[a:b], None, self._key(step, owner)) if b > a else NOTHING
            for owner, (a, b) in enumerate(self._shares)
        ]
        self._decode_shards(parts, out)
        return out

    def _encode_shards(
        self, bucket: Floats, left: Floats | None, step: Step, parts: list[Array]
    ) -> None:
        """Encode what the other ranks sum into ``parts``; empty shards stay as they are."""
        for owner, (a, b) in enumerate(self._shares):
            if b > a and owner != step.rank:
                rest = None if left is None else left[a:b]
                parts[owner] = self._encode(bucket[a:b], rest, self._key(step, owner))

    def _decode_shards(self, payloads: list[Array], bucket: Floats) -> None:
        """Write the sums that came."""
        for (a, b), payload in zip(self._shares, payloads, strict=True):
            if b > a:
                self._codec.decode(payload, bucket[a:b])

    def _decode_add(self, payload: Array, out: Floats) -> None:
        self._codec.decode_add(payload, out)

    def _key(self, step: Step, owner: int) -> int:
        return key_of(step.seed, self.unit.label, step.number, step.rank, owner)

    def _encode(self, x: Floats, left: Floats | None, key: int) -> Array:
        if left is None:
            return self._codec.encode(x, key)
        return self._codec.encode_with_residual(x, left, key)

    def _sum(self, bucket: Floats, kept: Kept, step: Step, received: list[Array]) -> Array:
        """Average the shards that came in with this rank's own, encoded only for a vote."""
        mine = bucket[self._lo : self._hi]
        left = None if kept.left is None else kept.left[self._lo : self._hi]
        if self._codec.votes:
            own = self._encode(mine, left, self._key(step, step.rank))
            mine[:] = 0
            self._decode_add(own, mine)
        elif left is not None:
            mine += left
            left[:] = 0
        for rank, part in enumerate(received):
            if rank != step.rank:
                self._decode_add(part, mine)
        mine *= np.float32(1 / step.size)
        if not self.memory.is_finite(mine):  # Finite values have a sum that is not.
            return NOTHING
        reply = self._encode(mine, kept.server, self._key(step, step.size))
        if kept.server is not None and not self.memory.is_finite(kept.server):
            return NOTHING  # The sum is more than the codec can encode.
        return reply
