"""``compression="auto"``: choose a scheme after the first steps, alike on all ranks.

The collectives are measured between these ranks, the kernels on these machines; what
backward leaves time for was seen in the steps before. The choice may well be not to compress: in
most data centres float16 is hard to beat (Agarwal et al., "On the utility of gradient
compression", MLSys 2022).

A prediction may be wrong, so what it has chosen is then timed for as many steps, and left again
where another is now expected to be faster. The choice is settled when that is one that has been
timed; each is at most once. A cast, which hardly changes gradients, is timed too where it might be
faster than what was chosen, whatever is predicted of it.
"""

import itertools
import logging
import os
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from hpc_dl.arrays import Parameter
from hpc_dl.comm import Communicator, Op
from hpc_dl.compress import Auto, Policy, policy_of
from hpc_dl.reduce.build import DENSE, divide
from hpc_dl.reduce.cost import Costs, Load, Prediction, Work, best, predict
from hpc_dl.reduce.measure import (
    casts_of,
    elements_of,
    measure_cast,
    measure_network,
    measure_work,
    schemes_of,
)
from hpc_dl.reduce.table import render

log = logging.getLogger("hpc_dl.compress")

#: Steps at the beginning that tell nothing: memory is allocated, kernels are loaded.
SETTLING = 2


class Chooser:
    """Watches the first steps, then chooses, and watches what it has chosen."""

    def __init__(self, auto: Auto, count: Callable[[], int] | None = None):
        """Begin to watch.

        Args:
            count: counts steps alike on all ranks, also after some have joined.
        """
        self._auto = auto
        self._count = itertools.count(1).__next__ if count is None else count
        self._taken, self._until = 0, auto.steps
        self._first_gradient: float | None = None
        self._policies = [policy_of(candidate) for candidate in auto.candidates]
        self._names = [_name(candidate) for candidate in auto.candidates]
        self._predictions: list[Prediction] = []
        self._without, self._bias = 0.0, 1.0
        self._least: list[float] = []
        self._current = -1
        self._measured: dict[int, float] = {}
        self.settled = False
        """Whether the last choice was the last one; else go on to report steps."""
        self._begin()

    def _begin(self) -> None:
        """Watch anew."""
        self._ended: float | None = None
        self._steps: list[float] = []
        self._waits: list[float] = []
        self._backwards: list[float] = []

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
        return self._taken > self._until

    def choose(
        self,
        comm: Communicator,
        parameters: Sequence[Parameter],
        capacity: int,
        device: Any = None,
    ) -> Policy:
        """Choose a policy; all ranks call this alike.

        Args:
            parameters: all dense gradients, with their types, in their order.
            capacity: bytes of a bucket.
            device: of torch, where gradients lie; by default on the host.
        """
        seen = (self._steps, self._waits, self._backwards)
        mine = [statistics.median(each[SETTLING:] or each or [0.0]) for each in seen]
        step, waited, backward = _slowest(comm, mine)
        if not self._predictions:
            load = max(0.0, step - waited), backward
            *self._predictions, dense = self._predict(comm, parameters, capacity, device, *load)
            self._without = step
            self._least = [
                _least(*load, (waited + backward) * p.sent / (dense.sent or 1.0))
                for p in self._predictions
            ]
            if step > 0 and dense.step > 0:
                self._bias = step / dense.step
        else:
            self._measured[self._current] = step
        expected = self._expected()
        fastest = expected.index(best(expected, self._auto.gain))
        following = self._unproven_cast(expected[fastest].step)
        if following is None or not self._is_measured(fastest):
            following = fastest
        # Rounded alike or not, rank 0 decides.
        decided = comm.broadcast(np.array([fastest, following], np.int64))
        fastest, chosen = int(decided[0]), int(decided[1])
        self.settled = self._is_measured(chosen)
        if comm.rank == 0:
            self._say(fastest, chosen, step)
        self._current = chosen
        self._until = self._taken + self._auto.steps
        self._begin()
        return self._policies[chosen]

    def _predict(
        self,
        comm: Communicator,
        parameters: Sequence[Parameter],
        capacity: int,
        device: Any,
        compute: float,
        backward: float,
    ) -> list[Prediction]:
        """Measure, and predict a step with each candidate, and at the end without compression."""
        policies = [*self._policies, DENSE]
        divisions = [divide(parameters, capacity, policy) for policy in policies]
        schemes, casts = schemes_of(divisions), casts_of(divisions)
        elements = elements_of(divisions)
        network = measure_network(comm, casts, device)
        works = [measure_work(s, comm.size, elements, device, comm.barrier) for s in schemes]
        casting = [measure_cast(name, elements, device, comm.barrier) for name in casts]
        cores = len(os.sched_getaffinity(0)) / comm.local_size
        # The slowest rank is the one that all wait for.
        alone, *figures = _slowest(
            comm, [float(cores < 2), *(work.seconds for work in works), *casting]
        )
        agreed = [Work(s, work.calls) for s, work in zip(figures, works, strict=False)]
        costs = Costs(
            network,
            dict(zip(schemes, agreed, strict=True)),
            dict(zip(casts, figures[len(works) :], strict=True)),
        )
        load = Load(compute, backward, spare_core=not alone)
        return [
            predict(name, division, load, costs)
            for name, division in zip([*self._names, "none"], divisions, strict=True)
        ]

    def _is_measured(self, candidate: int) -> bool:
        return candidate in self._measured or not self._policies[candidate].rules

    def _expected(self) -> list[Prediction]:
        """Return what was measured, or else predicted, less the error that all have in common."""
        return [
            p._replace(step=self._measured.get(number, p.step * self._bias))
            for number, p in enumerate(self._predictions)
        ]

    def _unproven_cast(self, step: float) -> int | None:
        """Return a cast that was not timed and might be faster than ``step``."""
        for number, policy in enumerate(self._policies):
            promising = self._least[number] < step * (1 - self._auto.gain)
            if policy.cast is not None and promising and not self._is_measured(number):
                return number
        return None

    def _say(self, fastest: int, chosen: int, step: float) -> None:
        """Log the table that the choice was made from, and later what came of it."""
        if self._current < 0:
            log.info(
                "compression=auto: a step takes %.2f ms without compression; predicted:\n%s%s",
                step * 1e3,
                render(self._predictions, self._predictions[fastest]),
                "" if chosen == fastest else f"\ntried: {self._names[chosen]}",
            )
            return
        log.info(
            "compression=auto: a step with %s takes %.2f ms, without compression %.2f ms; %s: %s",
            self._names[self._current],
            step * 1e3,
            self._without * 1e3,
            "from now on" if self.settled else "next",
            self._names[chosen],
        )


def _least(compute: float, backward: float, communication: float) -> float:
    """Return a step in which all that backward has time for is hidden."""
    return compute + max(0.0, communication - backward)


def _slowest(comm: Communicator, seconds: Sequence[float]) -> list[float]:
    """Return the largest of each figure over the ranks."""
    figures: list[float] = comm.allreduce(np.array(seconds, np.float64), Op.MAX).tolist()
    return figures


def _name(candidate: Any) -> str:
    return candidate if isinstance(candidate, str) else str(candidate.describe())
