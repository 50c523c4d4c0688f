"""What the three kinds of exchange have in common."""

from abc import ABC, abstractmethod
from typing import Any, NamedTuple

import numpy as np

from hpc_dl.comm import Communicator, Op
from hpc_dl.compress import Array, Floats, State, Step, Unit
from hpc_dl.compress.kernels.casts import narrow, widen
from hpc_dl.compress.kernels.checks import is_finite
from hpc_dl.compress.residual import make_residual
from hpc_dl.compress.scheme import Scheme
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

    def __init__(self, comm: Communicator, unit: Unit, scheme: Scheme, seed: int = 0):
        """Begin with no residual; all ranks call this alike."""
        self.comm, self.unit, self.scheme, self.seed = comm, unit, scheme, seed
        self.state: State = scheme.compressor.init(unit)
        self.residual = make_residual(scheme.residual, unit.size)
        self.momentum = np.zeros(unit.size, np.float32) if scheme.momentum else None
        self.shared = np.zeros(unit.size, np.float32) if scheme.shared_momentum else None
        self.health: Health | None = None
        self._gaps = _gaps(unit)
        self._owes = False

    def run(
        self, bucket: Floats, number: int, watch: bool = False, wire: np.dtype[Any] | None = None
    ) -> int:
        """Replace a gradient by the average over the ranks, or what stands for it.

        Where the gradient of any rank is not finite, what comes out is not finite either, on
        all ranks. That rank's residual stays as it was; the other ranks' takes up what they
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
        finite, warming = is_finite(bucket), number < self.scheme.warmup
        if finite:
            self._prepare(bucket, warming)
        if warming or wire is not None:
            sent = self._send_all(bucket, None if warming else wire)
        else:
            sent = self._compress(bucket, number, finite, watch)
        if self.shared is not None:
            self._remember(bucket, warming)
        return sent

    def _send_all(self, bucket: Floats, wire: np.dtype[Any] | None) -> int:
        before = self.arrays() if self._owes else {}
        self.flush(bucket)
        sent = bucket if wire is None else narrow(bucket, wire)
        self.comm.allreduce(sent, Op.AVERAGE)
        if sent is not bucket:
            widen(sent, bucket)
        if before and not is_finite(bucket):  # on any rank: nobody takes this step
            self._take_up(before)
        return bytes_of_allreduce(sent.nbytes, self.comm.size)

    def _compress(self, bucket: Floats, number: int, finite: bool, watch: bool) -> int:
        step = Step(number, self.comm.rank, self.comm.size, self.seed)
        left = None if self.residual is None else self.residual.load()
        whole = None
        if watch and finite:
            gradient = _dot(bucket, bucket)
            whole = bucket.copy() if left is None else bucket + left
        self._owes = True
        sent = self._average(bucket, left, step, finite)
        # What comes out there would be taken for a gradient in the next step.
        bucket[self._gaps] = 0
        if left is not None:
            left[self._gaps] = 0
        if self.residual is not None and left is not None and finite:
            self.residual.store(left)
        if watch:
            self.health = (
                Health(0, 0, 0, 0, 0, 1) if whole is None else _health(gradient, whole, left)
            )
        return sent

    def _prepare(self, bucket: Floats, warming: bool) -> None:
        """Let the compressor change a gradient, and take momentum."""
        self.scheme.compressor.prepare(bucket, self.comm.size)
        if self.momentum is not None:
            self.momentum *= np.float32(self.scheme.momentum)
            self.momentum += bucket
            np.copyto(bucket, self.momentum)
        if self.shared is not None and not warming:
            bucket *= np.float32(1 - self.scheme.shared_momentum)
            bucket += np.float32(self.scheme.shared_momentum) * self.shared

    def _remember(self, average: Floats, warming: bool) -> None:
        """Keep the momentum that all ranks share; a step that is not finite leaves no trace."""
        if self.shared is None or not is_finite(average):
            return
        if warming:
            beta = np.float32(self.scheme.shared_momentum)
            self.shared *= beta
            self.shared += (1 - beta) * average
        else:
            np.copyto(self.shared, average)

    def flush(self, bucket: Floats) -> None:
        """Add to a gradient what was left of the steps before, and forget it."""
        self._owes = False
        if self.residual is not None:
            bucket += self.residual.take()

    @abstractmethod
    def _average(self, bucket: Floats, left: Floats | None, step: Step, finite: bool) -> int:
        """Average a bucket; ``left`` becomes what was not sent; return the bytes sent.

        Where not ``finite``, ``bucket`` holds NaN or infinity, and ``left`` stays.
        """

    def arrays(self) -> dict[str, Array]:
        """Return what must be saved: flat arrays over the unit, and the compressor's state."""
        saved = {f"state.{key}": value.copy() for key, value in self.state.items()}
        if self.residual is not None:
            saved["residual"] = self.residual.load().copy()
        if self.momentum is not None:
            saved["momentum"] = self.momentum.copy()
        if self.shared is not None:
            saved["shared"] = self.shared.copy()
        return saved

    def load_arrays(self, saved: dict[str, Array]) -> None:
        """Take up what ``arrays`` returned."""
        for key, value in saved.items():
            if key.startswith("state."):
                self.state[key.removeprefix("state.")] = np.array(value)
        self._take_up(saved)
        if self.momentum is not None and "momentum" in saved:
            np.copyto(self.momentum, saved["momentum"])
        if self.shared is not None and "shared" in saved:
            np.copyto(self.shared, saved["shared"])

    def _take_up(self, saved: dict[str, Array]) -> None:
        """Owe again what was saved."""
        self._owes = True
        if self.residual is not None and "residual" in saved:
            self.residual.store(saved["residual"].astype(np.float32))


def _gaps(unit: Unit) -> Array:
    """Return the indices of all elements that belong to no parameter."""
    used = np.zeros(unit.size, np.bool_)
    for segment in unit.segments:
        used[segment.offset : segment.stop] = True
    return np.flatnonzero(~used)


def _dot(x: Floats, y: Floats) -> float:
    """Multiply; not finite where that overflows."""
    with np.errstate(over="ignore", invalid="ignore"):
        return float(np.dot(x, y))


def _health(gradient: float, whole: Floats, left: Floats | None) -> Health:
    squared = _dot(whole, whole)
    if left is None:  # Nothing says what was sent: nothing is held against it.
        return Health(gradient, squared, squared, squared, 0, 0)
    sent = whole - left
    return Health(
        gradient,
        squared,
        _dot(whole, sent),
        _dot(sent, sent),
        _dot(left, left),
        0,
    )
