"""All-reduce: every op, type, shape and path."""

import warnings

import numpy as np
import pytest

from hpc_dl.comm import Communicator, Op
from hpc_dl.comm.protocol import Array
from hpc_dl.errors import UnsupportedError
from hpc_dl.testing.conformance.suite import OnRanks, Suite, assert_same_everywhere
from hpc_dl.testing.conformance.values import (
    ALL,
    BOOL,
    COMPLEX,
    FLOATS,
    REAL,
    SHAPES,
    Dtype,
    around,
    expected,
    inputs,
    noise,
    values,
)
from hpc_dl.testing.same import assert_same_bytes

REDUCTIONS = (
    [(op, dtype) for op in (Op.SUM, Op.MIN, Op.MAX, Op.PRODUCT) for dtype in REAL]
    + [(op, dtype) for op in (Op.SUM, Op.PRODUCT) for dtype in COMPLEX]
    + [(op, BOOL) for op in (Op.MIN, Op.MAX)]
)


class AllreduceConformance(Suite):
    """``allreduce`` on ordinary memory."""

    @pytest.mark.parametrize(("op", "dtype"), REDUCTIONS, ids=lambda p: str(p))
    def test_allreduce(self, on_ranks: OnRanks, op: Op, dtype: Dtype) -> None:
        def check(comm: Communicator) -> None:
            for shape in SHAPES:
                x = inputs(op, shape, dtype, comm.rank, comm.size)
                result = comm.allreduce(x, op)
                assert result is x
                np.testing.assert_array_equal(x, expected(op, shape, dtype, comm.size))
                assert x.dtype == dtype
                assert x.shape == shape

        on_ranks(check)

    @pytest.mark.parametrize("dtype", FLOATS, ids=str)
    def test_average_and_scale(self, on_ranks: OnRanks, dtype: Dtype) -> None:
        def check(comm: Communicator) -> None:
            tolerance = 4 * np.finfo(dtype).eps
            for shape in SHAPES:
                mean = expected(Op.AVERAGE, shape, dtype, comm.size)
                for op, scale, factor in (
                    (Op.AVERAGE, 1.0, 1.0),
                    (Op.AVERAGE, 0.3, 0.3),
                    (Op.SUM, 0.7, 0.7 * comm.size),
                ):
                    x = comm.allreduce(values(shape, dtype, comm.rank), op, scale)
                    np.testing.assert_allclose(x, mean * factor, tolerance, tolerance)

        on_ranks(check)

    def test_op_by_name(self, on_ranks: OnRanks) -> None:
        def check(comm: Communicator) -> None:
            for op, total in (
                ("max", comm.size - 1),
                ("average", (comm.size - 1) / 2),
                ("sum", comm.size * (comm.size - 1) / 2),
            ):
                x = comm.allreduce(np.full(3, float(comm.rank)), op)  # type: ignore[arg-type]
                np.testing.assert_allclose(x, total)

        on_ranks(check)

    @pytest.mark.parametrize("dtype", [np.dtype(np.float32), *ALL[2:5]], ids=str)
    def test_around_thresholds(self, on_ranks: OnRanks, dtype: Dtype) -> None:
        def check(comm: Communicator) -> None:
            thresholds = self.thresholds if dtype == np.float32 else self.thresholds[:2]
            for length in around(thresholds, dtype):
                x = comm.allreduce(values((length,), dtype, comm.rank))
                np.testing.assert_array_equal(x, expected(Op.SUM, (length,), dtype, comm.size))

        on_ranks(check)

    def test_large_average(self, on_ranks: OnRanks) -> None:
        def check(comm: Communicator) -> None:
            for length in around(self.thresholds, FLOATS[0])[-2:]:
                x = comm.allreduce(values((length,), FLOATS[0], comm.rank), Op.AVERAGE)
                mean = expected(Op.AVERAGE, (length,), FLOATS[0], comm.size)
                np.testing.assert_allclose(x, mean, 1e-6)

        on_ranks(check)

    @pytest.mark.parametrize("dtype", FLOATS, ids=str)
    def test_same_bits_everywhere_and_each_time(self, on_ranks: OnRanks, dtype: Dtype) -> None:
        def check(comm: Communicator) -> None:
            for length in (1, 1001, *around(self.thresholds[:2], dtype)):
                first = comm.allreduce(noise(length, dtype, comm.rank))
                again = comm.allreduce(noise(length, dtype, comm.rank))
                assert_same_bytes(first, again)
                assert_same_everywhere(comm, first)
                exact = sum(noise(length, dtype, r).astype(np.float64) for r in range(comm.size))
                np.testing.assert_allclose(
                    first, exact, comm.size * np.finfo(dtype).eps, comm.size * np.finfo(dtype).eps
                )

        on_ranks(check)

    def test_integers_are_exact(self, on_ranks: OnRanks) -> None:
        """No path may go through a float type: these need 60 bits."""

        def check(comm: Communicator) -> None:
            for length in (5, *around(self.thresholds[:1], np.dtype(np.int64))):
                x = comm.allreduce(np.arange(length, dtype=np.int64) + (1 << 55) + comm.rank)
                ranks = comm.size * (comm.size - 1) // 2
                np.testing.assert_array_equal(
                    x, comm.size * (np.arange(length, dtype=np.int64) + (1 << 55)) + ranks
                )

        on_ranks(check)

    @pytest.mark.parametrize("length", [3, 70_000])
    def test_not_finite(self, on_ranks: OnRanks, length: int) -> None:
        def check(comm: Communicator) -> None:
            x = np.ones(length, np.float32)
            if comm.rank == comm.size - 1:
                x[:2] = np.nan, np.inf
            ops = [Op.SUM, Op.AVERAGE] + ([Op.MIN, Op.MAX] if self.spreads_nan else [])
            for op in ops:
                result = comm.allreduce(x.copy(), op)
                assert np.isnan(result[0])
                assert_same_everywhere(comm, result)
            assert comm.allreduce(x.copy())[1] == np.inf

        on_ranks(check)

    @pytest.mark.parametrize("length", [3, 70_000])
    def test_overflow_is_infinite_without_a_warning(self, on_ranks: OnRanks, length: int) -> None:
        def check(comm: Communicator) -> None:
            x = np.full(length, np.finfo(np.float32).max)
            comm.allreduce(x)
            assert np.isinf(x).all() == (comm.size > 1)

        with warnings.catch_warnings():
            warnings.simplefilter("error")
            on_ranks(check)

    def test_rows_of_a_larger_array(self, on_ranks: OnRanks) -> None:
        """They are contiguous, and are reduced in their place, not beyond it."""

        def check(comm: Communicator) -> None:
            whole = np.full((5, 4), float(comm.rank))
            comm.allreduce(whole[1:3])
            total = comm.size * (comm.size - 1) / 2
            assert whole[1:3].tolist() == [[total] * 4] * 2
            assert (whole[[0, 3, 4]] == comm.rank).all()

        on_ranks(check)

    def test_adasum(self, on_ranks: OnRanks) -> None:
        """Maleki et al., "Scaling distributed training with adaptive summation" (MLSys 2021)."""

        def pair(a: Array, b: Array) -> Array:
            dot = a @ b
            return np.asarray((1 - dot / (2 * (a @ a))) * a + (1 - dot / (2 * (b @ b))) * b)

        def check(comm: Communicator) -> None:
            if comm.size & (comm.size - 1):
                with pytest.raises(UnsupportedError, match="power of two"):
                    comm.allreduce(np.ones(3), Op.ADASUM)
                return
            everyone = [noise(1000, np.dtype(np.float64), r) + 0.5 for r in range(comm.size)]
            x = comm.allreduce(everyone[comm.rank].copy(), Op.ADASUM)
            while len(everyone) > 1:
                everyone = [pair(a, b) for a, b in zip(everyone[::2], everyone[1::2], strict=True)]
            np.testing.assert_allclose(x, everyone[0], 1e-10)

        if not self.adasum:
            pytest.skip("this communicator has no Adasum; the refusal is tested elsewhere")
        on_ranks(check)
