"""The replica guard: find out soon when replicas that must be equal are not.

A wrapped optimizer that does not reduce trains on silently and wrongly (Horovod 0.28.1 does
so under Keras 3). The guard compares a hash of all parameters over the ranks after the first
steps, then after 10, 100, 1000 and each further 1000 steps.
"""

import functools
import itertools
from collections.abc import Callable, Iterable

import numpy as np
import xxhash

from hpc_dl.comm import Communicator
from hpc_dl.comm.protocol import Array
from hpc_dl.errors import ReplicaDivergenceError

#: Steps after which replicas are compared; later, at multiples of the last.
FIRST_CHECKS = (1, 2, 10, 100, 1000)

Named = Iterable[tuple[str, Array]]


def digests(named: Named) -> tuple[list[str], Array]:
    """Hash each parameter: the names, and an int64 array of their xxh3 hashes."""
    names, hashes = [], []
    for name, array in named:
        data = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
        names.append(name)
        hashes.append(xxhash.xxh3_64_intdigest(data.data))
    return names, np.array(hashes, np.uint64).view(np.int64)


def check_replicas(comm: Communicator, named: Named, when: int | str) -> None:
    """Compare parameters over the ranks; all of them call this.

    Args:
        when: the step they come after, or another time in words.

    Raises:
        ReplicaDivergenceError: on all ranks; names the first parameter that differs.
    """
    names, hashes = digests(named)
    whole = np.array([xxhash.xxh3_64_intdigest(hashes.tobytes())], np.uint64).view(np.int64)
    everyone = comm.exchange(whole)
    if (everyone == everyone[0]).all():
        return
    table = comm.exchange(hashes)
    differing = (table != table[0]).any(axis=0)
    first = int(differing.argmax())
    ranks = np.flatnonzero(table[:, first] != table[0, first])
    time = when if isinstance(when, str) else f"step {when}"
    raise ReplicaDivergenceError(
        f"after {time} the replicas differ: {int(differing.sum())} of {len(names)} "
        f"parameters, first {names[first]!r}, on rank(s) {', '.join(map(str, ranks))} against "
        "rank 0. Usual causes: no broadcast of the initial parameters, an optimizer that "
        "is not wrapped, a random layer that changes weights, or a rank-dependent step. "
        "Where ranks are meant to differ pass guard=False"
    )


class ReplicaGuard:
    """Decides when to compare, so that the cost stays far below that of training."""

    def __init__(
        self,
        comm: Communicator,
        named: Callable[[], Named],
        enabled: bool = True,
        all_present: Callable[[], bool] = lambda: True,
        count: Callable[[], int] | None = None,
    ):
        """Watch parameters.

        Args:
            named: yields them as (name, host array).
            all_present: agrees with the other ranks to compare now; False if some have
                joined (run out of batches), whose parameters differ with good reason.
            count: counts steps from 1, on all ranks alike; by default calls are counted.
        """
        self._count = count or functools.partial(next, itertools.count(1))
        self._comm, self._named, self._all_present = comm, named, all_present
        self._enabled = enabled and comm.size > 1

    def after_step(self) -> None:
        """Count a step and compare if it is due; all ranks call it after each step."""
        step = self._count()
        if self._enabled and is_due(step) and self._all_present():
            check_replicas(self._comm, self._named(), step)


def is_due(step: int) -> bool:
    """Tell whether replicas are compared after ``step`` steps."""
    return step in FIRST_CHECKS or (step > 0 and step % FIRST_CHECKS[-1] == 0)
