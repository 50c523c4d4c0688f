"""The compressed buckets of one reducer: their exchanges, phases, guard and state."""

from collections.abc import Callable, Sequence

import ml_dtypes
import numpy as np

from hpc_dl.arrays import Bucket, Layout
from hpc_dl.comm import Communicator, Op
from hpc_dl.compress import Array, Limits, Scheme, Segment, Unit
from hpc_dl.reduce.exchange import Exchange, make_exchange
from hpc_dl.reduce.quality import Quality

_LIMITS = Limits()

#: State by parameter: ``saved[name]["residual"]`` is flat, of the parameter's size.
Saved = dict[str, dict[str, Array]]

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
    ):
        """Begin with no residuals; all ranks call this alike.

        Args:
            schemes: one for each bucket; None leaves it to an all-reduce.
            op: AVERAGE or SUM.
            scale: a factor on the result.
            limits: when compression is suspended.
            clock: tells the number of a step, where it is counted elsewhere.
        """
        self._comm = comm
        self._factor = np.float32(scale * (comm.size if op is Op.SUM else 1))
        self._exchanges: dict[int, Exchange] = {
            number: make_exchange(comm, unit_of(bucket), scheme, seed)
            for number, (bucket, scheme) in enumerate(zip(layout.buckets, schemes, strict=True))
            if scheme is not None
        }
        self._steps = dict.fromkeys(self._exchanges, 0)
        self._clock = clock
        self.quality = Quality(comm, limits)

    def covers(self, bucket: int) -> bool:
        """Tell whether a bucket is averaged here."""
        return bucket in self._exchanges

    def run(self, bucket: int, buffer: Array) -> int:
        """Average a bucket in place; return the bytes this rank sent."""
        exchange, step = self._exchanges[bucket], self._steps[bucket]
        if self._clock is not None:
            step = self._clock()
        self._steps[bucket] = step + 1
        if self.quality.suspended(step):
            sent = exchange.run(buffer, step, wire=np.dtype(ml_dtypes.bfloat16))
        else:
            watched = self.quality.looks(step)
            sent = exchange.run(buffer, step, watched)
            if watched and exchange.health is not None:
                self.quality.add(exchange.health)
        if bucket == max(self._exchanges):  # the last of this step, on all ranks
            self.quality.judge(step)
        if self._factor != 1:
            buffer *= self._factor
        return sent

    def report_loss(self, loss: float) -> None:
        """Let the guard see this rank's loss."""
        self.quality.loss = loss

    # --- state ----------------------------------------------------------------------

    def state_dict(self) -> Saved:
        """Return what is kept between steps, by parameter; copies."""
        saved: Saved = {}
        for number, exchange in self._exchanges.items():
            arrays = exchange.arrays()
            for segment in exchange.unit.segments:
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
                mine["step"] = np.array(self._steps[number], np.int64)
                saved[segment.name] = mine
        return saved

    def load_state_dict(self, saved: Saved) -> None:
        """Take up what ``state_dict`` returned, or what ``reshard`` made of it."""
        for number, exchange in self._exchanges.items():
            arrays = exchange.arrays()
            for segment in exchange.unit.segments:
                for key, value in saved.get(segment.name, {}).items():
                    if key == "step":
                        self._steps[number] = int(value)
                    elif key not in arrays:
                        continue  # of another compressor, or of a parameter elsewhere
                    elif key.startswith("state."):
                        arrays[key] = value
                    else:
                        arrays[key][segment.offset : segment.stop] = value
            exchange.load_arrays(arrays)


def unit_of(bucket: Bucket) -> Unit:
    """Describe a bucket to a compressor."""
    segments = tuple(
        Segment(parameter.name, parameter.shape, offset)
        for parameter, offset in zip(bucket.parameters, bucket.offsets, strict=True)
    )
    return Unit(segments, bucket.size)


def reshard(states: Sequence[Saved]) -> Saved:
    """Make of the states of all ranks the one that every rank of a world of any size loads.

    With an average of gradients, what the ranks together still owe is the mean of their
    residuals; each new rank takes that mean, so nothing is lost or counted twice. What the
    summing ranks owe lies in different places on different ranks, and is added up.
    """
    if not states:
        return {}
    result: Saved = {}
    for name, first in states[0].items():
        result[name] = {
            key: _merged(key, [state[name][key] for state in states if key in state.get(name, {})])
            for key in first
        }
    return result


def _merged(key: str, every: Sequence[Array]) -> Array:
    if key == "server":
        return np.asarray(np.stack(every).sum(axis=0), np.float32)
    if key in ("residual", "momentum"):
        return np.asarray(np.stack(every).mean(axis=0), np.float32)
    return every[0]
