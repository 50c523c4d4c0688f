"""The compressed buckets of one reducer: their exchanges, phases, guard and state."""

from collections.abc import Callable, Collection, Sequence
from typing import Any

import ml_dtypes
import numpy as np

from hpc_dl.arrays import Bucket, Layout
from hpc_dl.comm import Communicator, Op
from hpc_dl.compress import Array, Limits, Scheme, Segment, Unit
from hpc_dl.errors import OptionError
from hpc_dl.reduce.exchange import Exchange, make_exchange
from hpc_dl.reduce.exchange.sharded import Sharded
from hpc_dl.reduce.quality import Quality

_LIMITS = Limits()

#: State by parameter: ``saved[name]["residual"]`` is flat, of the parameter's size.
Saved = dict[str, dict[str, Array]]

#: Marks a state of all ranks together, of which each takes its part.
RESHARDED = "resharded"

#: Returns the number of the step under way: the optimizer's own, the same on all ranks.
Clock = Callable[[], int]


class BucketCompression:
    """Averages some buckets of a layout through compressors."""

    def __init__(
        self,
        comm: Communicator,
        layout: Layout,
        schemes: Sequence[Scheme | None],
        op: Op = Op.AVERAGE,
        scale: float = 1.0,
        limits: Limits = _LIMITS,
        seed: int = 0,
        clock: Clock | None = None,
        device: Any = None,
    ):
        """Begin with no residuals; all ranks call this alike.

        Args:
            schemes: one for each bucket; None leaves it to an all-reduce.
            op: AVERAGE or SUM.
            scale: a factor on the result.
            limits: when compression is suspended.
            clock: tells the number of a step, where it is counted elsewhere.
            device: as for ``make_exchange``.
        """
        self._comm = comm
        self._exchanges: dict[int, Exchange] = {
            number: make_exchange(comm, unit_of(bucket), scheme, seed, device)
            for number, (bucket, scheme) in enumerate(zip(layout.buckets, schemes, strict=True))
            if scheme is not None
        }
        for exchange in self._exchanges.values():
            exchange.factor = np.float32(scale * (comm.size if op is Op.SUM else 1))
        self._step = 0
        self._clock = clock
        self._limits = limits
        self.quality = Quality(comm, limits)

    def covers(self, bucket: int) -> bool:
        """Tell whether a bucket is averaged here."""
        return bucket in self._exchanges

    def note(self, bucket: int) -> None:
        """Take note that a gradient is on its way to a bucket, in the order of the caller."""
        self._exchanges[bucket].memory.note()

    def run(self, bucket: int, buffer: Any) -> int:
        """Average a bucket in place; return the bytes this rank sent."""
        exchange = self._exchanges[bucket]
        if self._clock is not None:
            self._step = self._clock()
        step = self._step
        if self.quality.suspended(step):
            sent = exchange.run(buffer, step, wire=np.dtype(ml_dtypes.bfloat16))
        else:
            watched = self.quality.looks(step)
            sent = exchange.run(buffer, step, watched)
            if watched and exchange.health is not None:
                self.quality.add(exchange.health, not exchange.memory.is_finite(buffer))
        if bucket == max(self._exchanges):  # the last of this step, on all ranks
            self.quality.judge(step)
            self._step = step + 1
        return sent

    @property
    def schemes(self) -> dict[str, Scheme]:
        """How each parameter that is averaged here is compressed."""
        return {
            segment.name: exchange.scheme
            for exchange in self._exchanges.values()
            for segment in exchange.unit.segments
        }

    def position(self) -> str:
        """Say what must be the same on all ranks: the step, and what the guard has done."""
        step = self._step if self._clock is None else self._clock()
        until, suspensions, _ = self.quality.state().astype(np.int64).tolist()
        return f"step {step}, suspended {suspensions} times, until step {until}"

    @property
    def serves_joined(self) -> bool:
        """Whether a rank that has joined can take part: it has no steps of its own any more."""
        return self._clock is None

    def report_loss(self, loss: float) -> None:
        """Let the guard see this rank's loss."""
        self.quality.loss = loss

    # --- state ----------------------------------------------------------------------

    def state_dict(self, names: Collection[str] | None = None) -> Saved:
        """Return what is kept between steps, by parameter; copies.

        Args:
            names: of the parameters; None: of all.
        """
        saved: Saved = {}
        for exchange in self._exchanges.values():
            wanted = [s for s in exchange.unit.segments if names is None or s.name in names]
            if not wanted:
                continue
            arrays = exchange.arrays()
            for segment in wanted:
                mine = {
                    key: value[segment.offset : segment.stop].copy()
                    for key, value in arrays.items()
                    if not key.startswith("state.") and value.size == exchange.unit.size
                }
                mine |= {
                    key: value
                    for key, value in arrays.items()
                    if key.startswith("state.") and key.endswith(f".{segment.name}")
                }
                mine["step"] = np.array(self._step, np.int64)
                mine["guard"] = self.quality.state()
                saved[segment.name] = mine
        return saved

    def begin_again(self) -> None:
        """Forget the steps and the guard's past, which are those of the state that comes next."""
        loss = self.quality.loss
        self._step, self.quality = 0, Quality(self._comm, self._limits)
        self.quality.loss = loss

    def load_state_dict(self, saved: Saved) -> None:
        """Take up what ``state_dict`` returned, or what ``reshard`` made of it.

        Of several steps the last counts, also of those that were taken here.
        """
        for exchange in self._exchanges.values():
            if not any(segment.name in saved for segment in exchange.unit.segments):
                continue
            arrays = exchange.arrays()
            for segment in exchange.unit.segments:
                state = saved.get(segment.name, {})
                for key, value in state.items():
                    if key == "step":
                        self._step = max(self._step, int(value))
                    elif key == "guard":
                        self.quality.load(value)
                    elif key not in arrays:
                        continue  # of another compressor, or of a parameter elsewhere
                    elif key.startswith("state."):
                        arrays[key] = value
                    else:
                        _check_size(segment, key, value)
                        if key == "server" and RESHARDED in state:
                            value = _own_part(exchange, segment, value)
                        arrays[key][segment.offset : segment.stop] = value
            exchange.load_arrays(arrays)


def _own_part(exchange: Exchange, segment: Segment, server: Array) -> Array:
    """Return what this rank takes over of what all ranks owe of sums."""
    assert isinstance(exchange, Sharded)
    return exchange.own_part(segment.offset, server)


def _check_size(segment: Segment, key: str, value: Array) -> None:
    if value.size != segment.size:
        raise OptionError(
            f"compression state of {segment.name!r}: {key} has {value.size} values, the parameter "
            f"has {segment.size}; load the state of the same model"
        )


def unit_of(bucket: Bucket) -> Unit:
    """Describe a bucket to a compressor."""
    segments = tuple(
        Segment(parameter.name, parameter.shape, offset)
        for parameter, offset in zip(bucket.parameters, bucket.offsets, strict=True)
    )
    return Unit(segments, bucket.size)


def reshard(states: Sequence[Saved], *, op: Op = Op.AVERAGE, size: int | None = None) -> Saved:
    """Make of the states of all ranks the one that every rank of a world of another size loads.

    What the ranks together still owe stays the same, so nothing is lost or counted twice. Of an
    average that is the mean of their residuals, and each new rank takes that mean. Of a sum it
    is the sum, of which each new rank takes its part. What the summing ranks owe lies in
    different places on different ranks, and is added up.

    Args:
        op: how gradients are combined, AVERAGE or SUM.
        size: the new number of ranks; needed for SUM.

    Raises:
        OptionError: SUM without ``size``.
    """
    if not states:
        return {}
    share = 1.0
    if op is Op.SUM:
        if size is None:
            raise OptionError(
                f"reshard() of the states of {len(states)} ranks with op=Sum; give size=, the "
                "number of ranks that share what these owe"
            )
        share = len(states) / size
    result: Saved = {}
    for name, first in states[0].items():
        every = [state[name] for state in states if name in state]
        result[name] = {
            key: _merged(key, [state[key] for state in every if key in state], share)
            for key in first
        }
        if "server" in first:
            result[name][RESHARDED] = np.array(True)
    return result


def _merged(key: str, every: Sequence[Array], share: float) -> Array:
    if key == "server":
        return np.asarray(np.stack(every).sum(axis=0) * share, np.float32)
    if key in ("residual", "momentum"):
        return np.asarray(np.stack(every).mean(axis=0) * share, np.float32)
    return every[0]
