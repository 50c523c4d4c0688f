"""What a compressor is: pure encoding with explicit state, and how its output is reduced.

A compressor works on flat float32 arrays, whatever framework the gradient came from. It
declares a reduction class, and the engine (``hpc_dl.reduce``) chooses the collective, so a
pairing that cannot work cannot be written:

* ``AllReduced``: yields buffers that can be summed (LINEAR, GLOBAL_SCALE, MULTI_ROUND),
* ``Codec``: encodes bytes that must be decoded before they are summed (TWO_PHASE),
* ``Sparsifier``: selects entries (GATHER).

Compressors are frozen dataclasses: their fields are the options of the spec string.

A step that is not finite on any rank, or whose sum is not, leaves no trace on any: what is left,
momentum and state are as before it. The engine hands out copies and keeps them only where the
step counts, so a compressor need not see to that.
"""

from abc import ABC, abstractmethod
from collections.abc import Generator
from enum import StrEnum
from typing import Any, ClassVar, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]
Floats = NDArray[np.float32]
Bytes = NDArray[np.uint8]

#: What a compressor remembers from step to step; the arrays are updated in place, and what has
#: changed is kept if the step counts.
State = dict[str, Array]


class Reduction(StrEnum):
    """How what is sent becomes the average over the ranks."""

    LINEAR = "linear"
    """It can be summed as it is: all-reduce."""
    GLOBAL_SCALE = "global-scale"
    """Integers on a scale that all ranks agree on first: two all-reduces."""
    MULTI_ROUND = "multi-round"
    """Several all-reduces, each made from the result of the one before."""
    TWO_PHASE = "two-phase"
    """All-to-all of encoded shards, float32 sum, and all-gather of encoded sums."""
    GATHER = "gather"
    """All-gather of what each rank selected."""


class Segment(NamedTuple):
    """A parameter's part of a flat array."""

    name: str
    shape: tuple[int, ...]
    offset: int

    @property
    def size(self) -> int:
        """The number of elements."""
        return int(np.prod(self.shape, dtype=np.int64))

    @property
    def stop(self) -> int:
        """The element behind the last one."""
        return self.offset + self.size

    def of(self, flat: Array) -> Array:
        """View this parameter in a flat array, in its shape."""
        return flat[self.offset : self.stop].reshape(self.shape)


class Unit(NamedTuple):
    """What is compressed together: a flat array of some parameters, zeros between them."""

    segments: tuple[Segment, ...]
    size: int

    @classmethod
    def single(cls, name: str, shape: tuple[int, ...]) -> "Unit":
        """Make a unit of one parameter."""
        segment = Segment(name, shape, 0)
        return cls((segment,), segment.size)

    @property
    def label(self) -> str:
        """A name that is the same on all ranks."""
        return self.segments[0].name if self.segments else ""


class Step(NamedTuple):
    """Which step this is, and who takes it."""

    number: int
    """Steps of the optimizer before this one, counted alike on all ranks."""
    rank: int = 0
    size: int = 1
    seed: int = 0


class Round(NamedTuple):
    """A buffer to be combined over the ranks, in place."""

    buffer: Array
    op: Literal["average", "sum", "max"]


class Sparse(NamedTuple):
    """Selected entries of a flat array."""

    indices: NDArray[np.int32]
    """Ascending."""
    values: Floats


class Compressor(ABC):
    """What all compressors have in common. Subclass one of the three kinds below."""

    name: ClassVar[str]
    reduction: ClassVar[Reduction]
    #: Whether what is not sent must be kept and added to the next gradient.
    needs_feedback: ClassVar[bool] = False
    #: Whether what waits is a momentum, so that no other must be taken.
    owns_momentum: ClassVar[bool] = False
    #: Whether what arrives is about as large as the gradient; else nothing must be kept.
    keeps_scale: ClassVar[bool] = True
    #: Says in one line what it does; shown by ``hpc-dl compress list``.
    summary: ClassVar[str] = ""

    @property
    def default_momentum(self) -> float:
        """Momentum correction that belongs to the compressor."""
        return 0.0

    def init(self, unit: Unit) -> State:
        """Return the state before the first step; the same on all ranks."""
        return {}

    def prepare(self, gradient: Floats, size: int) -> None:  # noqa: B027
        """Change a rank's finite gradient in place, before momentum and what was left.

        Args:
            size: the number of ranks.
        """

    @abstractmethod
    def payload_bytes(self, unit: Unit, size: int) -> float:
        """Return the bytes in theory of one rank's encoding of ``unit`` among ``size`` ranks."""


class AllReduced(Compressor):
    """A compressor whose buffers are combined by all-reduce."""

    @abstractmethod
    def rounds(
        self, x: Floats, out: Floats, left: Floats | None, state: State, unit: Unit, step: Step
    ) -> Generator[Round, None, None]:
        """Yield buffers; each has been combined over the ranks when the generator goes on.

        Args:
            x: flat, what this rank has to give.
            out: to be filled with an estimate of the ranks' average; other memory than ``x``
                and ``left``, which are two as well.
            left: where error feedback is on, to be filled with what of ``x`` was not sent,
                such that the mean of ``x - left`` over the ranks is what ``out`` becomes.

        A rank whose gradient is not finite is handed nothing but NaN. It must yield the same
        buffers, and NaN must come out of them on all ranks.
        """


class Codec(Compressor):
    """A compressor to bytes. Shards are encoded one by one, each from a multiple of ``align``."""

    reduction: ClassVar[Reduction] = Reduction.TWO_PHASE

    @property
    def align(self) -> int:
        """Shards begin at multiples of this; an attribute of the class will do as well."""
        return 1024

    #: Whether the sum is a vote, in which the summing rank's own values count as encoded too.
    votes: ClassVar[bool] = False

    @abstractmethod
    def encode(self, x: Floats, key: int) -> Bytes:
        """Encode finite values.

        Args:
            x: flat, at least one element.
            key: for random numbers; another one for each rank, shard and step.
        """

    @abstractmethod
    def decode(self, payload: Bytes, out: Floats) -> None:
        """Fill ``out``, of the length that was encoded."""

    def decode_add(self, payload: Bytes, out: Floats) -> None:
        """Add what was encoded to ``out``."""
        values = np.empty_like(out)
        self.decode(payload, values)
        out += values

    def encode_with_residual(self, x: Floats, left: Floats, key: int) -> Bytes:
        """Encode ``x + left``; ``left`` becomes what that encoding leaves out."""
        left += x
        payload = self.encode(left, key)
        sent = np.empty_like(left)
        self.decode(payload, sent)
        left -= sent
        return payload


class Sparsifier(Compressor):
    """A compressor that sends some entries, and the others later."""

    reduction: ClassVar[Reduction] = Reduction.GATHER
    needs_feedback: ClassVar[bool] = True
    #: Whether the number of entries is known beforehand; else the ranks agree on it.
    fixed: ClassVar[bool] = True

    @abstractmethod
    def select(self, x: Floats, state: State, unit: Unit, step: Step) -> Sparse:
        """Select entries of finite values."""

    def select_with_residual(
        self, x: Floats, left: Floats, state: State, unit: Unit, step: Step
    ) -> Sparse:
        """Select from ``x + left``; ``left`` becomes what is not selected."""
        left += x
        chosen = self.select(left, state, unit, step)
        left[chosen.indices] = 0
        return chosen

    def density(self, unit: Unit, step: Step) -> float:
        """Return the part of the entries that is sent, about."""
        return self.payload_bytes(unit, step.size) / (8 * max(unit.size, 1))

    def restore(self, total: Floats, out: Floats, unit: Unit) -> None:
        """Turn summed entries into a gradient; they may be coefficients of a transform.

        Linear in ``total``.
        """
        np.copyto(out, total)
