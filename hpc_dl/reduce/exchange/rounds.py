"""All-reduce of what a compressor yields: LINEAR, GLOBAL_SCALE and MULTI_ROUND."""

from collections.abc import Iterator
from typing import cast

import numpy as np

from hpc_dl.comm import Op
from hpc_dl.compress import AllReduced, Floats, Round, Step
from hpc_dl.reduce.exchange.base import Exchange
from hpc_dl.reduce.traffic import bytes_of_allreduce


class Rounds(Exchange):
    """Lets the compressor yield buffers and combines each over the ranks."""

    _x: Floats | None = None

    def _average(self, bucket: Floats, left: Floats | None, step: Step, finite: bool) -> int:
        memory = self.memory
        if self._x is None:
            # Kept: new memory costs more than what is done with it.
            self._x = memory.zeros(len(bucket))
        x = self._x
        x[:] = bucket if finite else np.nan
        if finite and left is not None:
            x += left
        # A rank whose gradient is not finite takes part in all rounds, and leaves no trace.
        rest = left if finite or left is None else memory.copy(left)
        before = {key: value.copy() for key, value in self.state.items()}
        sent = 0
        with np.errstate(all="ignore"):
            for wanted in self._rounds(x, bucket, rest, step):
                memory.allreduce(self.comm, wanted.buffer, Op(wanted.op))
                sent += bytes_of_allreduce(wanted.buffer.nbytes, self.comm.size)
        if not memory.is_finite(bucket):  # on all ranks alike
            bucket[:] = np.nan
            self.state.update(before)
            if left is not None and finite:
                left[:] = x
        return sent

    def _rounds(self, x: Floats, out: Floats, left: Floats | None, step: Step) -> Iterator[Round]:
        compressor = cast(AllReduced, self.scheme.compressor)
        return compressor.rounds(x, out, left, self.state, self.unit, step)
