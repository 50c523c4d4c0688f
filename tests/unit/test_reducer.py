"""Buckets go out in one order, whatever the order of the gradients, and come back reduced."""

import threading
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from hpc_dl.arrays import BFLOAT16, Layout, Parameter, plan
from hpc_dl.comm import Communicator, Op
from hpc_dl.compress import make
from hpc_dl.reduce import Reducer
from hpc_dl.reduce.compression import BucketCompression
from hpc_dl.reduce.reducer import OVERLAP_BYTES
from hpc_dl.reduce.traffic import Traffic, total
from hpc_dl.testing import run_threads

pytestmark = pytest.mark.timeout(60)

F32 = np.dtype(np.float32)
#: Larger and smaller than what is reduced on the communication thread.
LARGE, SMALL = (4 * OVERLAP_BYTES) // 16, 300


def _layout(elements: int, parameters: int = 8, buckets: int = 4) -> Layout:
    """Lay out equal parameters in so many buckets."""
    names = [Parameter(f"p{i}", (elements // parameters,), F32) for i in range(parameters)]
    return plan(names, names[0].nbytes * parameters // buckets)


def _gradient(name: str, size: int, rank: int, step: int) -> Any:
    seed = [int(name[1:]), rank, step]
    return np.random.default_rng(seed).standard_normal(size).astype(np.float32)


def _step(reducer: Reducer, comm: Communicator, step: int, order: list[str]) -> dict[str, Any]:
    """Deliver the gradients of a step in some order; return the results."""
    views, place = reducer.views(), reducer.layout.place()
    for name in order:
        views[name][:] = _gradient(name, len(views[name]), comm.rank, step)
        reducer.ready(place[name][0])
    reducer.finish()
    return {name: view.copy() for name, view in views.items()}


@pytest.mark.parametrize("elements", [LARGE, SMALL], ids=["overlap", "inline"])
@pytest.mark.parametrize("size", [1, 2, 3])
def test_order_of_readiness_does_not_matter(elements: int, size: int) -> None:
    """Each rank has its gradients in another order, and another in each step."""
    layout = _layout(elements)
    assert len(layout.buckets) == 4

    def main(comm: Communicator) -> None:
        reducer = Reducer(comm, layout)
        for step in range(3):
            order = np.random.default_rng([comm.rank, step]).permutation(list(layout.place()))
            results = _step(reducer, comm, step, list(order))
            for name, result in results.items():
                grads = [_gradient(name, len(result), r, step) for r in range(size)]
                np.testing.assert_allclose(result, np.mean(grads, axis=0), 1e-5, 1e-6)

    run_threads(size, main)


@settings(max_examples=15, suppress_health_check=[HealthCheck.too_slow], deadline=None)
@given(st.permutations(list(range(8))), st.permutations(list(range(8))))
def test_any_two_orders_give_the_same_bits(one: list[int], other: list[int]) -> None:
    def main(comm: Communicator) -> bytes:
        reducer = Reducer(comm, _layout(LARGE))
        order = one if comm.rank == 0 else other
        results = _step(reducer, comm, 0, [f"p{i}" for i in order])
        return b"".join(results[f"p{i}"].tobytes() for i in range(8))

    first, second = run_threads(2, main)
    assert first == second


def test_overlap_gives_the_bits_of_one_reduction_at_the_end(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def main(comm: Communicator) -> bytes:
        reducer = Reducer(comm, _layout(LARGE))
        results = _step(reducer, comm, 0, [f"p{i}" for i in range(8)])
        return b"".join(result.tobytes() for result in results.values())

    overlapped = run_threads(3, main)
    monkeypatch.setattr("hpc_dl.reduce.reducer.OVERLAP_BYTES", 1 << 40)
    assert run_threads(3, main) == overlapped


def test_buckets_start_as_they_fill() -> None:
    def main(comm: Communicator) -> None:
        reducer = Reducer(comm, _layout(LARGE))
        reducer.ready(1)
        reducer.ready(1)
        assert reducer._next == 0, "the first bucket is not full"
        reducer.ready(0)
        assert reducer._next == 0
        reducer.ready(0)
        # Both are on their way before the others are full.
        assert reducer._next == 2
        reducer.finish()
        assert reducer._next == 0

    run_threads(2, main)


@pytest.mark.parametrize("elements", [LARGE, SMALL], ids=["overlap", "inline"])
def test_gradient_that_does_not_come_counts_with_what_is_in_its_place(elements: int) -> None:
    def main(comm: Communicator) -> None:
        reducer = Reducer(comm, _layout(elements), Op.SUM)
        views = reducer.views()
        for view in views.values():
            view[:] = 1.0
        for number in range(8):
            if number != 3 or comm.rank == 0:
                reducer.ready(number // 2)
        reducer.finish()
        assert all((view == comm.size).all() for view in views.values())

    run_threads(3, main)


@pytest.mark.parametrize("elements", [LARGE, SMALL], ids=["overlap", "inline"])
def test_agrees_before_each_bucket(elements: int) -> None:
    def main(comm: Communicator) -> None:
        calls: list[str] = []
        reducer = Reducer(comm, _layout(elements), agree=lambda: calls.append("agree"))
        reduce, reduce_async = comm.allreduce, comm.allreduce_async

        def watched(call: Any) -> Any:
            def run(*args: Any) -> Any:
                comm.run(lambda: calls.append("reduce"))
                return call(*args)

            return run

        comm.allreduce, comm.allreduce_async = (  # type: ignore[method-assign]
            watched(reduce),
            watched(reduce_async),
        )
        for step in range(2):
            _step(reducer, comm, step, [f"p{i}" for i in range(8)])
        assert calls == ["agree", "reduce"] * 4 * 2

    run_threads(2, main)


def test_error_of_the_agreement_reaches_finish() -> None:
    def disagree() -> None:
        raise ZeroDivisionError("no agreement")

    def main(comm: Communicator) -> None:
        for elements in (LARGE, SMALL):
            reducer = Reducer(comm, _layout(elements), agree=disagree)
            with pytest.raises(ZeroDivisionError, match="no agreement"):
                _step(reducer, comm, 0, [f"p{i}" for i in range(8)])

    run_threads(1, main)


@pytest.mark.parametrize("elements", [LARGE, SMALL], ids=["overlap", "inline"])
def test_serve_takes_part_with_zeros(elements: int) -> None:
    def main(comm: Communicator) -> None:
        reducer = Reducer(comm, _layout(elements), Op.SUM)
        if comm.rank == 0:
            for _ in reducer.buffers:
                reducer.serve()
            return
        results = _step(reducer, comm, 0, [f"p{i}" for i in range(8)])
        for name, result in results.items():
            grads = [_gradient(name, len(result), r, 0) for r in range(1, comm.size)]
            np.testing.assert_allclose(result, np.sum(grads, axis=0), 1e-5, 1e-6)

    run_threads(3, main)


def test_traffic() -> None:
    """2 (n - 1) / n of the bytes in each step; and the wait is measured."""
    layout = _layout(LARGE)
    late = threading.Event()

    def main(comm: Communicator) -> None:
        reducer = Reducer(comm, layout)
        assert reducer.traffic() == (0, 0, 0.0, 0)
        for step in range(2):
            if comm.rank == 0:
                late.wait(0.2)
            _step(reducer, comm, step, [f"p{i}" for i in range(8)])
        steps, sent, waited, dense = reducer.traffic()
        assert (steps, sent) == (2, 2 * (2 * 2 * layout.nbytes // 3))
        assert dense == sent
        assert waited > (0.3 if comm.rank else 0)
        assert (waited < 0.3) or comm.rank

    run_threads(3, main)


@pytest.mark.parametrize("size", [1, 2, 3])
def test_traffic_of_what_is_compressed(size: int) -> None:
    """What compression sent, beside what the same buckets would have been."""
    layout = plan([Parameter("w", (64, 64), F32), Parameter("b", (512,), F32)], 1)
    schemes = [make("fp16:error_feedback=fp32"), None]

    def main(comm: Communicator) -> None:
        compression = BucketCompression(comm, layout, schemes)
        reducer = Reducer(comm, layout, compression=compression)
        for view in reducer.views().values():
            view[:] = 1.0
        reducer.finish()
        done, share = reducer.traffic(), 2 * (size - 1) / size
        assert done.steps == 1
        assert done.bytes_dense == pytest.approx(share * layout.nbytes, abs=1)
        assert done.bytes_sent == pytest.approx(share * (2 * 64 * 64 + 4 * 512), abs=2)

    run_threads(size, main)


def test_total_adds_what_reducers_did_in_the_same_steps() -> None:
    assert total([]) == (0, 0, 0.0, 0)
    assert total([Traffic(3, 10, 0.5, 40), Traffic(2, 1, 0.25, 4)]) == (3, 11, 0.75, 44)


def test_types_and_scale() -> None:
    layout = plan([Parameter("a", (500,), F32), Parameter("b", (3, 7), BFLOAT16)], 1 << 20)

    def main(comm: Communicator) -> None:
        reducer = Reducer(comm, layout, Op.SUM, scale=0.5)
        views = reducer.views()
        assert views["b"].dtype == BFLOAT16
        for view in views.values():
            view[:] = comm.rank
        reducer.finish()
        for view in views.values():
            assert (view.astype(float) == 0.5 * (0 + 1 + 2)).all()

    run_threads(3, main)


def test_nothing_to_reduce() -> None:
    run_threads(2, lambda comm: Reducer(comm, plan([], 100)).finish())


def test_buffers_of_the_caller() -> None:
    layout = _layout(SMALL)

    def main(comm: Communicator) -> None:
        mine = [np.full(bucket.size, 1.0, F32) for bucket in layout.buckets]
        reducer = Reducer(comm, layout, Op.SUM, buffers=mine)
        reducer.finish()
        assert all((buffer == comm.size).all() for buffer in mine)

    run_threads(2, main)
