"""All-reduce in memory from ``allocate``, which may take a path of its own."""

import numpy as np
import pytest

from hpc_dl.comm import Communicator, Op
from hpc_dl.comm.protocol import Array
from hpc_dl.testing.conformance.suite import OnRanks, Suite, assert_same_everywhere
from hpc_dl.testing.conformance.values import (
    ALL,
    BOOL,
    FLOATS,
    SHAPES,
    Dtype,
    around,
    expected,
    noise,
    values,
)


def _allocated(comm: Communicator, shape: tuple[int, ...], dtype: Dtype) -> Array:
    """Return an array in such memory with this rank's values."""
    size = int(np.prod(shape))
    x = comm.allocate(size * dtype.itemsize).view(dtype)[:size].reshape(shape)
    x[...] = values(shape, dtype, comm.rank)
    return x


class AllocatedConformance(Suite):
    """``allocate``, ``owns``, and ``allreduce`` on such memory."""

    def test_allocated_memory_is_zeroed_and_owned(self, on_ranks: OnRanks) -> None:
        def check(comm: Communicator) -> None:
            for nbytes in (0, 1, 4096, 100_001):
                memory = comm.allocate(nbytes)
                assert memory.dtype == np.uint8
                assert memory.shape == (nbytes,)
                assert not memory.any()
                assert memory.flags.writeable
            assert not comm.owns(np.zeros(8))

        on_ranks(check)

    @pytest.mark.parametrize("dtype", [d for d in ALL if d != BOOL], ids=str)
    def test_allreduce_allocated(self, on_ranks: OnRanks, dtype: Dtype) -> None:
        def check(comm: Communicator) -> None:
            for shape in SHAPES:
                x = _allocated(comm, shape, dtype)
                comm.allreduce(x)
                np.testing.assert_array_equal(x, expected(Op.SUM, shape, dtype, comm.size))

        on_ranks(check)

    def test_allocated_around_thresholds(self, on_ranks: OnRanks) -> None:
        def check(comm: Communicator) -> None:
            small = around(self.thresholds[:2], FLOATS[0])
            for length in (*small, *around(self.thresholds[2:], FLOATS[0])[-1:]):
                x = _allocated(comm, (length,), FLOATS[0])
                for op in (Op.SUM, Op.MAX) if length in small else (Op.SUM,):
                    x[:] = values((length,), FLOATS[0], comm.rank)
                    comm.allreduce(x, op)
                    want = expected(op, (length,), FLOATS[0], comm.size)
                    np.testing.assert_array_equal(x, want)

        on_ranks(check)

    def test_allocated_parts(self, on_ranks: OnRanks) -> None:
        """Buckets: reduce some parts, in one order on all ranks, and leave the rest alone."""

        def check(comm: Communicator) -> None:
            bounds = [(0, 3), (3, 20_003), (20_003, 60_000), (70_000, 70_001)]
            x = _allocated(comm, (90_000,), FLOATS[0])
            want = x.copy()
            for lo, hi in reversed(bounds):
                comm.allreduce(x[lo:hi])
                want[lo:hi] = expected(Op.SUM, (90_000,), FLOATS[0], comm.size)[lo:hi]
            np.testing.assert_array_equal(x, want)

        on_ranks(check)

    def test_allocated_average_again_and_again(self, on_ranks: OnRanks) -> None:
        """What a training loop does: write, reduce, read, in one place."""

        def check(comm: Communicator) -> None:
            x = comm.allocate(400_000).view(np.float32)
            for step in range(5):
                x[:] = noise(len(x), FLOATS[0], comm.rank + step * comm.size)
                comm.allreduce(x, Op.AVERAGE)
                ranks = range(step * comm.size, (step + 1) * comm.size)
                mean = sum(noise(len(x), FLOATS[0], r).astype(np.float64) for r in ranks)
                np.testing.assert_allclose(x, np.asarray(mean) / comm.size, 1e-5, 1e-6)
                assert_same_everywhere(comm, x)

        on_ranks(check)

    def test_allocated_in_other_collectives(self, on_ranks: OnRanks) -> None:
        def check(comm: Communicator) -> None:
            x = _allocated(comm, (30, 2), FLOATS[1])
            gathered = comm.allgather(x)
            for rank, part in enumerate(gathered):
                np.testing.assert_array_equal(part, values((30, 2), FLOATS[1], rank))
            comm.broadcast(x, comm.size - 1)
            np.testing.assert_array_equal(x, values((30, 2), FLOATS[1], comm.size - 1))

        on_ranks(check)
