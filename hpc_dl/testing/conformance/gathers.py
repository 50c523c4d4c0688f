"""All-gather, all-to-all, reduce-scatter, broadcast and exchange."""

import numpy as np
import pytest

from hpc_dl.comm import Communicator, Op
from hpc_dl.comm.protocol import Array
from hpc_dl.testing.conformance.suite import OnRanks, Suite
from hpc_dl.testing.conformance.values import (
    ALL,
    FLOATS,
    REAL,
    SHAPES,
    Dtype,
    around,
    expected,
    inputs,
    values,
)

#: What follows dimension 0: nothing, something, and nothing in it.
ROWS: tuple[tuple[int, ...], ...] = ((), (3,), (2, 2), (0,))


def _equal(got: Array, want: Array) -> None:
    assert got.dtype == want.dtype
    np.testing.assert_array_equal(got, want, strict=True)


class GathersConformance(Suite):
    """The collectives that return new arrays, and broadcast."""

    @pytest.mark.parametrize("dtype", ALL, ids=str)
    def test_allgather(self, on_ranks: OnRanks, dtype: Dtype) -> None:
        def check(comm: Communicator) -> None:
            for shape in SHAPES:
                mine = values(shape, dtype, comm.rank)
                gathered = comm.allgather(mine)
                assert len(gathered) == comm.size
                for rank, part in enumerate(gathered):
                    _equal(part, values(shape, dtype, rank))
                    assert not np.may_share_memory(part, mine)

        on_ranks(check)

    @pytest.mark.parametrize("row", ROWS, ids=str)
    def test_allgather_ragged(self, on_ranks: OnRanks, row: tuple[int, ...]) -> None:
        """Rank r gives r rows, so rank 0 gives none; then only the last gives any."""

        def check(comm: Communicator) -> None:
            for lengths in (range(comm.size), [0] * (comm.size - 1) + [5], [0] * comm.size):
                mine = values((lengths[comm.rank], *row), FLOATS[0], comm.rank)
                for rank, part in enumerate(comm.allgather(mine)):
                    _equal(part, values((lengths[rank], *row), FLOATS[0], rank))

        on_ranks(check)

    @pytest.mark.parametrize("dtype", ALL, ids=str)
    def test_alltoall(self, on_ranks: OnRanks, dtype: Dtype) -> None:
        def part(source: int, dest: int) -> Array:
            return values((2, 3), dtype, 5 * source + dest)

        def check(comm: Communicator) -> None:
            came = comm.alltoall([part(comm.rank, dest) for dest in range(comm.size)])
            assert len(came) == comm.size
            for source, got in enumerate(came):
                _equal(got, part(source, comm.rank))

        on_ranks(check)

    @pytest.mark.parametrize("row", ROWS, ids=str)
    def test_alltoall_ragged(self, on_ranks: OnRanks, row: tuple[int, ...]) -> None:
        """Some parts are empty; then all are."""

        def check(comm: Communicator) -> None:
            for factor in (2, 0):

                def part(source: int, dest: int, factor: int = factor) -> Array:
                    rows = factor * ((source + 2 * dest) % 3)
                    return values((rows, *row), FLOATS[1], 5 * source + dest)

                came = comm.alltoall([part(comm.rank, dest) for dest in range(comm.size)])
                for source, got in enumerate(came):
                    _equal(got, part(source, comm.rank))

        on_ranks(check)

    @pytest.mark.parametrize("dtype", REAL, ids=str)
    def test_reduce_scatter(self, on_ranks: OnRanks, dtype: Dtype) -> None:
        """Also where the rows are fewer than the ranks, or do not divide."""

        def check(comm: Communicator) -> None:
            for shape in ((0,), (1,), (comm.size,), (2 * comm.size + 1, 3), (1001,)):
                for op in (Op.SUM, Op.MIN, Op.MAX, Op.PRODUCT):
                    x = inputs(op, shape, dtype, comm.rank, comm.size)
                    before = x.copy()
                    share = comm.reduce_scatter(x, op)
                    whole = expected(op, shape, dtype, comm.size).astype(dtype)
                    _equal(share, np.array_split(whole, comm.size)[comm.rank])
                    _equal(x, before)

        on_ranks(check)

    def test_reduce_scatter_average(self, on_ranks: OnRanks) -> None:
        def check(comm: Communicator) -> None:
            x = values((100, 3), FLOATS[0], comm.rank)
            share = comm.reduce_scatter(x, Op.AVERAGE, 2.0)
            mean = expected(Op.AVERAGE, (100, 3), FLOATS[0], comm.size)
            want = np.array_split(2 * mean, comm.size)[comm.rank]
            np.testing.assert_allclose(share, want, 1e-6, 1e-6)

        on_ranks(check)

    @pytest.mark.parametrize("dtype", ALL, ids=str)
    def test_broadcast(self, on_ranks: OnRanks, dtype: Dtype) -> None:
        def check(comm: Communicator) -> None:
            for shape in SHAPES:
                for root in {0, comm.size // 2, comm.size - 1}:
                    x = values(shape, dtype, comm.rank)
                    assert comm.broadcast(x, root) is x
                    _equal(x, values(shape, dtype, root))

        on_ranks(check)

    def test_large(self, on_ranks: OnRanks) -> None:
        def check(comm: Communicator) -> None:
            for length in around(self.thresholds[:2], FLOATS[0])[-2:]:
                x = values((length,), FLOATS[0], comm.rank)
                for rank, part in enumerate(comm.allgather(x)):
                    _equal(part, values((length,), FLOATS[0], rank))
                whole = expected(Op.SUM, (length,), FLOATS[0], comm.size).astype(np.float32)
                share = np.array_split(whole, comm.size)[comm.rank]
                _equal(comm.reduce_scatter(x), share)
                root = comm.size - 1
                _equal(comm.broadcast(x, root), values((length,), FLOATS[0], root))

        on_ranks(check)

    def test_exchange(self, on_ranks: OnRanks) -> None:
        def check(comm: Communicator) -> None:
            for dtype in (np.dtype(np.int64), np.dtype(np.uint8), FLOATS[0]):
                for length in (0, 1, 5, 3000):
                    rows = comm.exchange(values((length,), dtype, comm.rank))
                    want = [values((length,), dtype, r) for r in range(comm.size)]
                    _equal(rows, np.stack(want))

        on_ranks(check)

    def test_what_is_only_read_may_have_any_strides(self, on_ranks: OnRanks) -> None:
        """It is copied where it is not contiguous; read-only memory is served as well."""

        def check(comm: Communicator) -> None:
            whole = values((6, 8), FLOATS[0], comm.rank)
            for view in (whole.T, whole[::2, 1:], np.broadcast_to(whole[0], (4, 8))):
                for rank, part in enumerate(comm.allgather(view)):
                    theirs = values((6, 8), FLOATS[0], rank)
                    if view.shape == (8, 6):
                        _equal(part, theirs.T)
                    elif view.shape == (3, 7):
                        _equal(part, theirs[::2, 1:])
                    else:
                        _equal(part, np.tile(theirs[0], (4, 1)))
            whole.setflags(write=False)
            total = expected(Op.SUM, (6, 8), FLOATS[0], comm.size).astype(np.float32)
            share = np.array_split(total.T, comm.size)[comm.rank]
            _equal(comm.reduce_scatter(whole.T), share)
            came = comm.alltoall([whole.T[:dest] for dest in range(comm.size)])
            for source, got in enumerate(came):
                _equal(got, values((6, 8), FLOATS[0], source).T[: comm.rank])

        on_ranks(check)

    def test_results_can_be_written_to(self, on_ranks: OnRanks) -> None:
        def check(comm: Communicator) -> None:
            x = values((comm.size, 2), FLOATS[0], comm.rank)
            parts = np.split(x, comm.size)
            for result in (*comm.allgather(x), *comm.alltoall(parts), comm.reduce_scatter(x)):
                result += 1
            _equal(x, values((comm.size, 2), FLOATS[0], comm.rank))
            comm.barrier()

        on_ranks(check)
