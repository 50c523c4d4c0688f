"""What the three kinds of exchange have in common."""

from abc import ABC, abstractmethod
from typing import Any, NamedTuple

import numpy as np

from hpc_dl.comm import Communicator, Op
from hpc_dl.compress import Array, Floats, State, Step, Unit
from hpc_dl.compress.scheme import Scheme
from hpc_dl.reduce.exchange.memory import Memory
from hpc_dl.reduce.traffic import bytes_of_allreduce


class Health(NamedTuple):
    """How a gradient fared in one step, on this rank: sums of squares, and a product."""

    gradient: float
    whole: float
    """Of the gradient with what was left of the steps before."""
    product: float
    """Of the whole and what was sent of it."""
    sent: float
    left: float
    not_finite: float
    """1 where the gradient was not finite, which leaves all others 0."""


class Exchange(ABC):
    """Averages one bucket over the ranks, compressed, step after step."""

    def __init__(
        self,
        comm: Communicator,
        unit: Unit,
        scheme: Scheme,
        seed: int = 0,
        memory: Memory | None = None,
    ):
        """Begin with no residual; all ranks call this alike.

        Args:
            memory: where buckets lie; by default on the host.
        """
        self.comm, self.unit, self.scheme, self.seed = comm, unit, scheme, seed
        self.memory = memory or Memory()
        #: A factor on what comes out.
        self.factor = np.float32(1)
        self.state: State = scheme.compressor.init(unit)
        self.residual = self.memory.residual(scheme.residual, unit.size)
        self.momentum = self.memory.zeros(unit.size) if scheme.momentum else None
        self.shared = self.memory.zeros(unit.size) if scheme.shared_momentum else None
        self.health: Health | None = None
        self._gaps = _gaps(unit)
        self._gap_places = self.memory.from_host(self._gaps)
        self._owes = False

    def run(
        self, bucket: Floats, number: int, watch: bool = False, wire: np.dtype[Any] | None = None
    ) -> int:
        """Replace a gradient by the average over the ranks, or what stands for it.

        Where the gradient of any rank is not finite, what comes out is not finite either, on
        all ranks. That rank's residual stays as it was; the other ranks' may take up what they
        have sent in vain.

        Args:
            bucket: flat, float32.
            number: the step, from 0.
            watch: measure the ``health``.
            wire: send everything, also what was left of the steps before, in this type
                instead of compressing it.

        Returns:
            Bytes that this rank sent.
        """
        if self.unit.size == 0:
            return 0
        with self.memory.working():
            return self._run(bucket, number, watch, wire)

    def _run(self, bucket: Floats, number: int, watch: bool, wire: np.dtype[Any] | None) -> int:
        finite, warming = self.memory.is_finite(bucket), number < self.scheme.warmup
        if finite:
            self._prepare(bucket, warming)
        if warming or wire is not None:
            sent = self._send_all(bucket, None if warming else wire)
        else:
            sent = self._compress(bucket, number, finite, watch)
        if self.shared is not None:
            self._remember(bucket, warming)
        if self.factor != 1:
            bucket *= self.factor
        return sent

    def _send_all(self, bucket: Floats, wire: np.dtype[Any] | None) -> int:
        before = self.arrays() if self._owes else {}
        self.flush(bucket)
        sent = bucket if wire is None else self.memory.narrow(bucket, wire)
        self.memory.allreduce(self.comm, sent, Op.AVERAGE)
        if sent is not bucket:
            self.memory.widen(sent, bucket)
        if before and not self.memory.is_finite(bucket):  # on any rank: nobody takes this step
            self._take_up(before)
        return bytes_of_allreduce(sent.nbytes, self.comm.size)

    def _compress(self, bucket: Floats, number: int, finite: bool, watch: bool) -> int:
        step = Step(number, self.comm.rank, self.comm.size, self.seed)
        left = None if self.residual is None else self.residual.load()
        whole = None
        if watch and finite:
            gradient = self.memory.dot(bucket, bucket)
            whole = self.memory.copy(bucket) if left is None else bucket + left
        self._owes = True
        sent = self._average(bucket, left, step, finite)
        # What comes out there would be taken for a gradient in the next step.
        bucket[self._gap_places] = 0
        if left is not None:
            left[self._gap_places] = 0
        if self.residual is not None and left is not None and finite:
            self.residual.store(left)
        if watch:
            nothing = Health(0, 0, 0, 0, 0, 1)
            self.health = nothing if whole is None else self._measure(gradient, whole, left)
        return sent

    def _prepare(self, bucket: Floats, warming: bool) -> None:
        """Let the compressor change a gradient, and take momentum."""
        self.scheme.compressor.prepare(bucket, self.comm.size)
        if self.momentum is not None:
            self.momentum *= np.float32(self.scheme.momentum)
            self.momentum += bucket
            bucket[:] = self.momentum
        if self.shared is not None and not warming:
            bucket *= np.float32(1 - self.scheme.shared_momentum)
            bucket += self.shared * np.float32(self.scheme.shared_momentum)

    def _remember(self, average: Floats, warming: bool) -> None:
        """Keep the momentum that all ranks share; a step that is not finite leaves no trace."""
        if self.shared is None or not self.memory.is_finite(average):
            return
        if warming:
            beta = np.float32(self.scheme.shared_momentum)
            self.shared *= beta
            self.shared += average * (1 - beta)
        else:
            self.shared[:] = average

    def flush(self, bucket: Floats) -> None:
        """Add to a gradient what was left of the steps before, and forget it."""
        with self.memory.working():
            self._owes = False
            if self.residual is not None:
                bucket += self.residual.take()

    def _measure(self, gradient: float, whole: Floats, left: Floats | None) -> Health:
        dot = self.memory.dot
        squared = dot(whole, whole)
        if left is None:  # Nothing says what was sent: nothing is held against it.
            return Health(gradient, squared, squared, squared, 0, 0)
        sent = whole - left
        return Health(gradient, squared, dot(whole, sent), dot(sent, sent), dot(left, left), 0)

    @abstractmethod
    def _average(self, bucket: Floats, left: Floats | None, step: Step, finite: bool) -> int:
        """Average a bucket; ``left`` becomes what was not sent; return the bytes sent.

        Where not ``finite``, ``bucket`` holds NaN or infinity, and ``left`` stays.
        """

    def arrays(self) -> dict[str, Array]:
        """Return what must be saved: flat arrays over the unit, and the compressor's state."""
        with self.memory.working():
            return self._arrays()

    def _arrays(self) -> dict[str, Array]:
        saved = {f"state.{key}": value.copy() for key, value in self.state.items()}
        if self.residual is not None:
            saved["residual"] = self.memory.to_host(self.residual.load())
        if self.momentum is not None:
            saved["momentum"] = self.memory.to_host(self.momentum)
        if self.shared is not None:
            saved["shared"] = self.memory.to_host(self.shared)
        return saved

    def load_arrays(self, saved: dict[str, Array]) -> None:
        """Take up what ``arrays`` returned."""
        with self.memory.working():
            self._load(saved)

    def _load(self, saved: dict[str, Array]) -> None:
        for key, value in saved.items():
            if key.startswith("state."):
                self.state[key.removeprefix("state.")] = np.array(value)
        self._take_up(saved)
        if self.momentum is not None and "momentum" in saved:
            self.momentum[:] = self.memory.from_host(saved["momentum"])
        if self.shared is not None and "shared" in saved:
            self.shared[:] = self.memory.from_host(saved["shared"])

    def _take_up(self, saved: dict[str, Array]) -> None:
        """Owe again what was saved."""
        self._owes = True
        if self.residual is not None and "residual" in saved:
            self.residual.store(self.memory.from_host(saved["residual"].astype(np.float32)))


def _gaps(unit: Unit) -> Array:
    """Return the indices of all elements that belong to no parameter."""
    used = np.zeros(unit.size, np.bool_)
    for segment in unit.segments:
        used[segment.offset : segment.stop] = True
    return np.flatnonzero(~used)
