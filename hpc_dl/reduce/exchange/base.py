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


class Kept(NamedTuple):
    """What a rank keeps between steps: copies to be changed, kept only if the step counts."""

    left: Floats | None
    """What was not sent; None without error feedback, or where nothing is owed."""
    server: Floats | None
    """What was not sent of the sums of this rank's shard, where it sums one."""
    velocity: Floats | None
    """The momentum that is taken before compression."""
    state: State
    """The compressor's."""


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

        Where the gradient of any rank is not finite, or the sum is not, NaN comes out on all
        ranks, and the step leaves no trace on any: what is left, momentum and the compressor's
        state are as before. All gradients of that step are dropped, as they are where an
        optimizer skips a step without compression.

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
        dense = warming or wire is not None
        self.health = None
        kept = self._begin(not dense or self._owes)
        if finite:
            self._prepare(bucket, kept, warming)
        elif dense:
            bucket[:] = np.nan  # What is too large may have a finite average.
        if dense:
            sent = self._send_all(bucket, kept, None if warming else wire)
            counts = self.memory.is_finite(bucket)
        else:
            sent, counts = self._compress(bucket, kept, number, finite, watch)
        if not counts:
            bucket[:] = np.nan
        # What comes out there would be taken for a gradient in the next step.
        bucket[self._gap_places] = 0
        if counts:
            self._keep(kept)
            self._owes = not dense
            self._remember(bucket, warming)
        if self.factor != 1:
            bucket *= self.factor
        return sent

    def _begin(self, owes: bool) -> Kept:
        """Lend what is kept; without the residuals where nothing is owed."""
        return Kept(
            self.residual.load() if owes and self.residual is not None else None,
            None,
            None if self.momentum is None else self.memory.copy(self.momentum),
            {key: value.copy() for key, value in self.state.items()},
        )

    def _keep(self, kept: Kept) -> None:
        """Let a step count."""
        if self.residual is not None and kept.left is not None:
            self.residual.store(kept.left)
        self.momentum, self.state = kept.velocity, kept.state

    def _send_all(self, bucket: Floats, kept: Kept, wire: np.dtype[Any] | None) -> int:
        self._pay(bucket, kept)
        sent = bucket if wire is None else self.memory.narrow(bucket, wire)
        self.memory.allreduce(self.comm, sent, Op.AVERAGE)
        if sent is not bucket:
            self.memory.widen(sent, bucket)
        return bytes_of_allreduce(sent.nbytes, self.comm.size)

    def _compress(
        self, bucket: Floats, kept: Kept, number: int, finite: bool, watch: bool
    ) -> tuple[int, bool]:
        step = Step(number, self.comm.rank, self.comm.size, self.seed)
        left, whole = kept.left, None
        if watch and finite:
            gradient = self.memory.dot(bucket, bucket)
            whole = self.memory.copy(bucket) if left is None else bucket + left
        result = self._average(bucket, kept, step, finite)
        if left is not None:
            left[self._gap_places] = 0
        if watch:
            nothing = Health(0, 0, 0, 0, 0, 1)
            self.health = nothing if whole is None else self._measure(gradient, whole, left, step)
        return result

    def _prepare(self, bucket: Floats, kept: Kept, warming: bool) -> None:
        """Let the compressor change a gradient, and take momentum."""
        self.scheme.compressor.prepare(bucket, self.comm.size)
        if kept.velocity is not None:
            velocity = kept.velocity
            velocity *= np.float32(self.scheme.momentum)
            velocity += bucket
            bucket[:] = velocity
        if self.shared is not None and not warming:
            bucket *= np.float32(1 - self.scheme.shared_momentum)
            bucket += self.shared * np.float32(self.scheme.shared_momentum)

    def _remember(self, average: Floats, warming: bool) -> None:
        """Keep the momentum that all ranks share."""
        if self.shared is None:
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
            kept = self._begin(owes=True)
            self._pay(bucket, kept)
            self._keep(kept)
            self._owes = False

    def _pay(self, bucket: Floats, kept: Kept) -> None:
        """Add to a gradient all that is owed, so that nothing is left."""
        if kept.left is not None:
            bucket += kept.left
            kept.left[:] = 0

    def _measure(self, gradient: float, whole: Floats, left: Floats | None, step: Step) -> Health:
        dot, rest = self.memory.dot, 0.0
        if left is None:
            sent = self._own(whole, step)
            sent[self._gap_places] = 0
        else:
            sent, rest = whole - left, dot(left, left)
        return Health(gradient, dot(whole, whole), dot(whole, sent), dot(sent, sent), rest, 0)

    @abstractmethod
    def _average(self, bucket: Floats, kept: Kept, step: Step, finite: bool) -> tuple[int, bool]:
        """Average a bucket, and put what was not sent into ``kept``.

        Args:
            finite: else ``bucket`` holds NaN or infinity.

        Returns:
            The bytes sent, and whether the step counts, which is the same on all ranks: not if
            the gradient of any is not finite, or anything that comes out. Then it makes no
            difference what is in ``bucket`` and ``kept``.
        """

    @abstractmethod
    def _own(self, whole: Floats, step: Step) -> Floats:
        """Return what of a gradient is sent, where no error feedback tells, decoded."""

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
        self._owes = True
        for key, value in saved.items():
            if key.startswith("state."):
                self.state[key.removeprefix("state.")] = np.array(value)
        if self.residual is not None and "residual" in saved:
            self.residual.store(self.memory.from_host(saved["residual"].astype(np.float32)))
        if self.momentum is not None and "momentum" in saved:
            self.momentum[:] = self.memory.from_host(saved["momentum"])
        if self.shared is not None and "shared" in saved:
            self.shared[:] = self.memory.from_host(saved["shared"])


def _gaps(unit: Unit) -> Array:
    """Return the indices of all elements that belong to no parameter."""
    used = np.zeros(unit.size, np.bool_)
    for segment in unit.segments:
        used[segment.offset : segment.stop] = True
    return np.flatnonzero(~used)
