"""All-reduce of what a compressor yields: LINEAR, GLOBAL_SCALE and MULTI_ROUND."""

from collections.abc import Iterator
from typing import cast

import numpy as np

from hpc_dl.comm import Op
from hpc_dl.compress import AllReduced, Floats, Round, State, Step
from hpc_dl.reduce.exchange.base import Exchange, Kept
from hpc_dl.reduce.traffic import bytes_of_allreduce


class Rounds(Exchange):
    """Lets the compressor yield buffers and combines each over the ranks."""

    _x: Floats | None = None

    def _average(self, bucket: Floats, kept: Kept, step: Step, finite: bool) -> tuple[int, bool]:
        memory, left = self.memory, kept.left
        if self._x is None:
            # Kept: new memory costs more than what is done with it.
            self._x = memory.zeros(len(bucket))
        x = self._x
        # A rank whose gradient is not finite takes part in all rounds.
        x[:] = bucket if finite else np.nan
        if finite and left is not None:
            x += left
        sent = 0
        with np.errstate(all="ignore"):
            for wanted in self._rounds(x, bucket, left, kept.state, step):
                memory.allreduce(self.comm, wanted.buffer, Op(wanted.op))
                sent += bytes_of_allreduce(wanted.buffer.nbytes, self.comm.size)
        return sent, memory.is_finite(bucket)

    def _own(self, whole: Floats, step: Step) -> Floats:
        """Return what a world of one rank would make of it."""
        out: Floats = self.memory.zeros(len(whole))
        state = {key: value.copy() for key, value in self.state.items()}
        with np.errstate(all="ignore"):
            for _ in self._rounds(whole, out, None, state, step._replace(size=1)):
                pass
        return out

    def _rounds(
        self, x: Floats, out: Floats, left: Floats | None, state: State, step: Step
    ) -> Iterator[Round]:
        compressor = cast(AllReduced, self.scheme.compressor)
        return compressor.rounds(x, out, left, state, self.unit, step)
