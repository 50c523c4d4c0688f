"""All-reduce of what a compressor yields: LINEAR, GLOBAL_SCALE and MULTI_ROUND."""

from typing import cast

import numpy as np

from hpc_dl.comm import Op
from hpc_dl.compress import AllReduced, Floats, Step
from hpc_dl.compress.kernels.checks import is_finite
from hpc_dl.reduce.exchange.base import Exchange
from hpc_dl.reduce.traffic import bytes_of_allreduce


class Rounds(Exchange):
    """Lets the compressor yield buffers and combines each over the ranks."""

    def _average(self, bucket: Floats, left: Floats | None, step: Step, finite: bool) -> int:
        compressor = cast(AllReduced, self.scheme.compressor)
        x = np.full_like(bucket, np.nan)
        if finite:
            np.copyto(x, bucket) if left is None else np.add(bucket, left, out=x)
        # A rank whose gradient is not finite takes part in all rounds, and leaves no trace.
        rest = left if finite or left is None else np.empty_like(left)
        gradient = bucket.copy() if left is not None and finite else None
        before = {key: value.copy() for key, value in self.state.items()}
        sent = 0
        with np.errstate(all="ignore"):
            for wanted in compressor.rounds(x, bucket, rest, self.state, self.unit, step):
                self.comm.allreduce(wanted.buffer, Op(wanted.op))
                sent += bytes_of_allreduce(wanted.buffer.nbytes, self.comm.size)
        if not is_finite(bucket):  # on all ranks alike
            bucket.fill(np.nan)
            self.state.update(before)
            if left is not None and gradient is not None:
                np.subtract(x, gradient, out=left)
        return sent
