"""``compression="auto"``: choose a scheme after the first steps, alike on all ranks.

The collectives are measured between these ranks, the kernels on these machines; what
backward leaves time for was seen in the steps before. The choice may well be not to compress: in
most data centres float16 is hard to beat (Agarwal et al., "On the utility of gradient
compression", MLSys 2022).
"""

import itertools
import logging
import os
import statistics
import time
from collections.abc import Callable, Sequence

import numpy as np

from hpc_dl.arrays import Parameter, plan
from hpc_dl.comm import Communicator, Op
from hpc_dl.compress import Auto, Policy, Unit, make, policy_of
from hpc_dl.reduce.compression import unit_of
from hpc_dl.reduce.cost import Kernel, Load, Prediction, best, predict
from hpc_dl.reduce.measure import measure_kernel, measure_network

log = logging.getLogger("hpc_dl.compress")

#: Steps at the beginning that tell nothing: memory is allocated, kernels are loaded.
SETTLING = 2


class Chooser:
    """Watches the first steps, then chooses."""

    def __init__(self, auto: Auto, count: Callable[[], int] | None = None):
        """Begin to watch.

        Args:
            count: counts steps alike on all ranks, also after some have joined.
        """
        self._auto = auto
        self._count = itertools.count(1).__next__ if count is None else count
        self._taken = 0
        self._steps: list[float] = []
        self._waits: list[float] = []
        self._backwards: list[float] = []
        self._ended: float | None = None
        self._first_gradient: float | None = None

    def gradient(self) -> None:
        """Say that a gradient is ready: the first one of a step tells when they begin to come."""
        if self._first_gradient is None:
            self._first_gradient = time.perf_counter()

    def step(self, began: float, waited: float) -> None:
        """Say that a step has been reduced.

        Args:
            began: when backward was over and waiting began; ``time.perf_counter``.
            waited: seconds of waiting.
        """
        self._taken = self._count()
        now = time.perf_counter()
        if self._ended is not None:
            self._steps.append(now - self._ended)
            self._waits.append(waited)
            first = began if self._first_gradient is None else self._first_gradient
            self._backwards.append(max(0.0, began - first))
        self._ended, self._first_gradient = now, None

    def due(self) -> bool:
        """Tell whether enough steps were seen."""
        return self._taken > self._auto.steps

    def choose(self, comm: Communicator, parameters: Sequence[Parameter], capacity: int) -> Policy:
        """Choose a policy; all ranks call this alike.

        Args:
            parameters: all dense gradients, in their order.
            capacity: bytes of a bucket.
        """
        units = _units(parameters, capacity)
        cores = len(os.sched_getaffinity(0)) / comm.local_size
        seen = (self._steps, self._waits, self._backwards)
        mine = [
            *(statistics.median(each[SETTLING:] or each or [0.0]) for each in seen),
            -float(cores >= 2),
        ]
        network = measure_network(comm)
        policies = [policy_of(candidate) for candidate in self._auto.candidates]
        schemes = [p.rules[0].scheme if p.rules else make("none") for p in policies]
        kernels = [measure_kernel(scheme) for scheme in schemes]
        flat = np.array([*mine, *(seconds for kernel in kernels for seconds in kernel)])
        # The slowest rank is the one that all wait for.
        agreed = comm.allreduce(flat, Op.MAX).tolist()
        step, waited, backward, spare = agreed[:4]
        load = Load(units, max(0.0, step - waited), backward, spare_core=spare < 0)
        predictions = [
            predict(scheme, load, network, Kernel(*agreed[4 + 2 * i : 6 + 2 * i]))
            for i, scheme in enumerate(schemes)
        ]
        chosen = best(predictions, self._auto.gain)
        if comm.rank == 0:
            log.info("%s", _table(predictions, chosen, step))
        return policies[predictions.index(chosen)]


def _units(parameters: Sequence[Parameter], capacity: int) -> tuple[Unit, ...]:
    wide = [p._replace(dtype=np.dtype(np.float32)) for p in parameters]
    return tuple(unit_of(bucket) for bucket in plan(wide, capacity).buckets)


def _table(predictions: Sequence[Prediction], chosen: Prediction, step: float) -> str:
    """Write the table that the choice was made from."""
    lines = [f"compression=auto: a step takes {step * 1e3:.2f} ms without compression; predicted:"]
    for p in predictions:
        mark = "->" if p is chosen else "  "
        lines.append(
            f"{mark} {p.scheme.name:10} {p.step * 1e3:9.2f} ms a step: network "
            f"{p.network * 1e3:9.2f} ms, kernels {p.kernels * 1e3:9.2f} ms, "
            f"{p.sent / 1e6:9.3f} MB sent"
        )
    return "\n".join(lines)
