"""Reduce gradients in fusion buckets, each as soon as it is full.

Buckets go out in one fixed order on all ranks, whatever the order in which gradients become
ready, so ranks can never wait for each other in different buckets.
"""

import functools
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

from hpc_dl.arrays import Layout
from hpc_dl.comm import Communicator, Op, Work
from hpc_dl.errors import RanksJoinedError
from hpc_dl.reduce.compression import BucketCompression, Saved
from hpc_dl.reduce.traffic import Traffic, bytes_of_allreduce

#: Below this many bytes in all there is nothing to overlap: one reduction at the end of
#: backward costs less than handing buckets to another thread.
OVERLAP_BYTES = 1 << 20


class Reducer:
    """Reduces a fixed set of buckets, step after step."""

    def __init__(
        self,
        comm: Communicator,
        layout: Layout,
        op: Op = Op.AVERAGE,
        scale: float = 1.0,
        buffers: Sequence[Any] | None = None,
        agree: Callable[[], object] | None = None,
        name: str | None = None,
        compression: BucketCompression | None = None,
        dense_bytes: int | None = None,
    ):
        """Allocate the buckets; all ranks call this alike.

        Args:
            comm: the ranks that reduce together.
            layout: which parameter lies where.
            op: how the ranks' values are combined.
            scale: a factor on the result.
            buffers: one flat buffer for each bucket, for memory of a GPU; by default NumPy
                arrays from ``comm.allocate``, in which reduction is fastest.
            agree: called before each bucket, in the order of the collectives: where ranks
                make sure that all are about to reduce it.
            name: the same on all ranks; by which Horovod knows the buckets again.
            compression: averages the buckets that it covers.
            dense_bytes: of the gradients in their own types, for the record; by default those
                of the buckets.
        """
        self.layout = layout
        self.buffers: list[Any] = (
            [
                comm.allocate(bucket.nbytes).view(bucket.dtype)[: bucket.size]
                for bucket in layout.buckets
            ]
            if buffers is None
            else list(buffers)
        )
        self._comm, self._op, self._scale, self._agree = comm, op, scale, agree
        self.compression = compression
        self._dense_bytes = layout.nbytes if dense_bytes is None else dense_bytes
        count = len(self.buffers)
        self._names = [None if name is None else f"{name}.{i}" for i in range(count)]
        self._starts = [self._start_of(bucket) for bucket in range(count)]
        self._instead: dict[int, Any] = {}
        large = len(layout.buckets) > 1 and layout.nbytes >= OVERLAP_BYTES
        self._overlap = large or comm.negotiates  # Horovod's thread is there in any case
        self._missing = [0] * len(layout.buckets)
        self._next, self._served = 0, 0
        self._works: list[Work] = []
        self._error: BaseException | None = None
        self._steps, self._bytes, self._waited = 0, 0, 0.0
        self._rearm()

    def views(self) -> dict[str, Any]:
        """Return each parameter's part of its bucket, flat, by name."""
        return {
            parameter.name: buffer[offset : offset + parameter.size]
            for bucket, buffer in zip(self.layout.buckets, self.buffers, strict=True)
            for parameter, offset in zip(bucket.parameters, bucket.offsets, strict=True)
        }

    def takes_place_of(self, bucket: int) -> bool:
        """Tell whether ``ready`` may be given an array of its own for ``bucket``.

        Horovod copies what it fuses, so another copy into a bucket gains nothing.
        """
        alone = len(self.layout.buckets[bucket].parameters) == 1
        return self._comm.negotiates and alone and self._compression_of(bucket) is None

    def ready(self, bucket: int, instead: Any = None) -> None:
        """Say that one more gradient of ``bucket`` is in its place; start what can start.

        Args:
            instead: reduced in place this time, instead of the bucket: flat, of its type and
                length; where ``takes_place_of`` says so.
        """
        self._missing[bucket] -= 1
        compression = self._compression_of(bucket)
        if compression is not None:
            compression.note(bucket)
        if instead is not None:
            self._instead[bucket] = instead
        if self._overlap:
            while self._next < len(self._missing) and self._missing[self._next] <= 0:
                self._start(self._next)

    def finish(self) -> None:
        """Reduce what has not been reduced and wait for all; the buckets then hold results.

        Gradients that were not reported ready count with what their place holds.
        """
        begin = time.perf_counter()
        try:
            self._finish()
        finally:
            self._rearm()
        self._waited += time.perf_counter() - begin
        self._steps += 1

    def _finish(self) -> None:
        if not self._overlap:
            for bucket in range(len(self.buffers)):
                self._reduce(bucket)
            return
        while self._next < len(self.buffers):
            self._start(self._next)
        errors = []
        for work in self._works:
            try:
                work.wait()
            except BaseException as error:
                errors.append(error)
        if errors:
            raise errors[0]

    def serve(self) -> None:
        """Reduce one bucket, in turn, with zeros, after ``agree``: for a rank that has joined."""
        if self.compression is not None and not self.compression.serves_joined:
            raise RanksJoinedError(
                "1-bit optimizers count their own steps, so a rank that has joined cannot take "
                "part in the steps of the others; give all ranks equally many batches"
            )
        bucket = self._served
        self._served = (bucket + 1) % len(self.buffers)
        self.buffers[bucket][:] = 0
        self._combine(bucket)

    def traffic(self) -> Traffic:
        """Return steps, bytes sent and seconds waited so far."""
        buckets = enumerate(self.layout.buckets)
        plain = sum(bucket.nbytes for i, bucket in buckets if self._compression_of(i) is None)
        sent = self._bytes + self._steps * bytes_of_allreduce(plain, self._comm.size)
        dense = bytes_of_allreduce(self._dense_bytes, self._comm.size)
        return Traffic(self._steps, sent, self._waited, self._steps * dense)

    def _compression_of(self, bucket: int) -> BucketCompression | None:
        """Return what averages a bucket, None for an all-reduce."""
        if self.compression is not None and self.compression.covers(bucket):
            return self.compression
        return None

    def _start_of(self, bucket: int) -> Callable[[], Work]:
        """Return the function that starts a bucket's reduction."""
        if self._comm.negotiates and self._compression_of(bucket) is None:
            # Its calls agree by themselves, and run in a thread of its own.
            buffer = self.buffers[bucket]
            name = self._names[bucket]
            return self._comm.persistent_allreduce(buffer, self._op, self._scale, name)
        return lambda: self._comm.submit(functools.partial(self._reduce, bucket))

    def _start(self, bucket: int) -> None:
        self._next = bucket + 1
        if bucket in self._instead:
            instead = self._instead[bucket]
            name = self._names[bucket]
            self._works.append(self._comm.allreduce_async(instead, self._op, self._scale, name))
        else:
            self._works.append(self._starts[bucket]())

    def _reduce(self, bucket: int) -> None:
        """Agree on a bucket and reduce it, unless one before it has failed on all ranks."""
        if self._error is not None:
            raise self._error
        try:
            if self._agree is not None:
                self._agree()
            self._combine(bucket)
        except BaseException as error:
            self._error = error
            raise

    def _combine(self, bucket: int) -> None:
        buffer, compression = self.buffers[bucket], self._compression_of(bucket)
        if compression is not None:
            self._bytes += compression.run(bucket, buffer)
        else:
            self._comm.allreduce(buffer, self._op, self._scale)

    def _rearm(self) -> None:
        self._missing = [len(bucket.parameters) for bucket in self.layout.buckets]
        self._next, self._works, self._error = 0, [], None
        self._instead = {}


def state_of(reducers: Iterable[Reducer]) -> Saved:
    """Return what compression keeps between steps, by parameter."""
    saved: Saved = {}
    for compression in _compressions(reducers):
        saved |= compression.state_dict()
    return saved


def load_state(reducers: Iterable[Reducer], saved: Saved) -> None:
    """Take up what ``state_of`` returned."""
    for compression in _compressions(reducers):
        compression.load_state_dict(saved)


def report_loss(reducers: Iterable[Reducer], loss: float) -> None:
    """Let the guard of compression see this rank's loss."""
    for compression in _compressions(reducers):
        compression.report_loss(loss)


def _compressions(reducers: Iterable[Reducer]) -> Iterator[BucketCompression]:
    for reducer in reducers:
        if reducer.compression is not None:
            yield reducer.compression
