"""Asynchronous collectives: any number under way, waited for in any order."""

import time

import numpy as np
import pytest

from hpc_dl.comm import Communicator, Op, Work
from hpc_dl.testing.conformance.suite import OnRanks, Suite
from hpc_dl.testing.conformance.values import (
    ALL,
    BOOL,
    FLOATS,
    SHAPES,
    Dtype,
    around,
    expected,
    values,
)


def _poll(work: Work) -> None:
    """Wait by asking ``done`` again and again."""
    deadline = time.monotonic() + 60
    while not work.done():
        assert time.monotonic() < deadline, "done() stays False"
        time.sleep(0.001)


class AsynchronousConformance(Suite):
    """The ``*_async`` methods, ``run`` and ``submit``."""

    @pytest.mark.parametrize("dtype", [d for d in ALL if d != BOOL], ids=str)
    def test_allreduce_async(self, on_ranks: OnRanks, dtype: Dtype) -> None:
        def check(comm: Communicator) -> None:
            for shape in SHAPES:
                x = values(shape, dtype, comm.rank)
                work = comm.allreduce_async(x, Op.SUM)
                assert work.wait() is x
                np.testing.assert_array_equal(x, expected(Op.SUM, shape, dtype, comm.size))
                assert work.done()
                assert work.wait() is x

        on_ranks(check)

    def test_persistent_allreduce(self, on_ranks: OnRanks) -> None:
        def check(comm: Communicator) -> None:
            shape, dtype = (1003, 2), FLOATS[0]
            x = np.empty(shape, dtype)
            start = comm.persistent_allreduce(x, Op.AVERAGE, 3.0, name="persistent")
            for _ in range(3):
                np.copyto(x, values(shape, dtype, comm.rank))
                assert start().wait() is x
                total = expected(Op.SUM, shape, dtype, comm.size)
                np.testing.assert_allclose(x, total * (3.0 / comm.size), rtol=1e-6)

        on_ranks(check)

    def test_all_kinds_at_once_out_of_order(self, on_ranks: OnRanks) -> None:
        def check(comm: Communicator) -> None:
            rank, size = comm.rank, comm.size
            shape, dtype = (1003, 2), FLOATS[0]
            total = expected(Op.SUM, shape, dtype, size)
            works: list[tuple[str, Work]] = []
            for _ in range(3):
                x = values(shape, dtype, rank)
                parts = [values((dest, 2), dtype, rank) for dest in range(size)]
                works += [
                    ("allreduce", comm.allreduce_async(x.copy())),
                    ("allgather", comm.allgather_async(x)),
                    ("alltoall", comm.alltoall_async(parts)),
                    ("broadcast", comm.broadcast_async(x.copy(), size - 1)),
                    ("scatter", comm.reduce_scatter_async(x)),
                ]
            order = np.random.default_rng(rank).permutation(len(works))
            for what, work in (works[i] for i in order):
                _poll(work)
                result = work.wait()
                if what == "allreduce":
                    np.testing.assert_array_equal(result, total)
                elif what == "allgather":
                    for source, part in enumerate(result):
                        np.testing.assert_array_equal(part, values(shape, dtype, source))
                elif what == "alltoall":
                    for source, part in enumerate(result):
                        np.testing.assert_array_equal(part, values((rank, 2), dtype, source))
                elif what == "broadcast":
                    np.testing.assert_array_equal(result, values(shape, dtype, size - 1))
                else:
                    want = np.array_split(total, size)[rank]
                    np.testing.assert_array_equal(result, want)

        on_ranks(check)

    def test_many_buckets(self, on_ranks: OnRanks) -> None:
        """Sizes around the thresholds, some in allocated memory, with work in between."""

        def check(comm: Communicator) -> None:
            lengths = [1, 500, *around(self.thresholds[:2], FLOATS[0])]
            buckets = [
                comm.allocate(4 * n).view(np.float32) if number % 2 else np.zeros(n, np.float32)
                for number, n in enumerate(lengths)
            ]
            for step in range(2):
                works = []
                for x in buckets:
                    x[:] = values((len(x),), FLOATS[0], comm.rank + step)
                    works.append(comm.allreduce_async(x))
                for x, work in zip(reversed(buckets), reversed(works), strict=True):
                    work.wait()
                    stack = [values((len(x),), FLOATS[0], r + step) for r in range(comm.size)]
                    np.testing.assert_array_equal(x, np.sum(stack, axis=0))

        on_ranks(check)

    def test_synchronous_after_asynchronous(self, on_ranks: OnRanks) -> None:
        """Whether earlier works are complete or not, ranks meet in the same collectives."""

        def check(comm: Communicator) -> None:
            works = []
            for number in range(10):
                works.append(comm.allreduce_async(np.full(2000, float(number + comm.rank))))
                if (number + comm.rank) % 3 == 0:
                    works[-1].wait()
                gathered = comm.allgather(np.array([100 * number + comm.rank]))
                assert [int(g[0]) for g in gathered] == [100 * number + r for r in range(comm.size)]
            for number, work in enumerate(works):
                total = comm.size * number + comm.size * (comm.size - 1) / 2
                assert (work.wait() == total).all()

        on_ranks(check)

    def test_run_and_submit_keep_the_order(self, on_ranks: OnRanks) -> None:
        def check(comm: Communicator) -> None:
            seen: list[str] = []

            def step(name: str) -> str:
                comm.exchange(np.array([ord(name)], np.int64))
                seen.append(name)
                return name

            first = comm.submit(lambda: step("a"))
            second = comm.submit(lambda: step("b"))
            assert comm.run(lambda: step("c")) == "c"
            assert (second.wait(), first.wait()) == ("b", "a")
            assert seen == ["a", "b", "c"]

        on_ranks(check)

    @pytest.mark.parametrize("dtype", [d for d in ALL if d != BOOL], ids=str)
    def test_collectives_within_a_call_that_is_run(self, on_ranks: OnRanks, dtype: Dtype) -> None:
        def check(comm: Communicator) -> None:
            x = values((1003,), dtype, comm.rank)

            def both() -> None:
                comm.allreduce(x, Op.SUM)
                comm.barrier()

            comm.submit(both).wait()
            np.testing.assert_array_equal(x, expected(Op.SUM, (1003,), dtype, comm.size))

        on_ranks(check)

    def test_error_reaches_the_one_who_waits(self, on_ranks: OnRanks) -> None:
        def check(comm: Communicator) -> None:
            def fail() -> None:
                raise ZeroDivisionError("on purpose")

            work = comm.submit(fail)
            for _ in range(2):
                with pytest.raises(ZeroDivisionError, match="on purpose"):
                    work.wait()
            assert comm.allreduce(np.ones(1))[0] == comm.size

        on_ranks(check)
