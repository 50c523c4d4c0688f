"""Gradients in buckets over real ranks: reduced in shared memory while others are written."""

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from hpc_dl.arrays import Layout, Parameter, plan
from hpc_dl.comm import Communicator, Op, make
from hpc_dl.errors import ReplicaDivergenceError
from hpc_dl.reduce import Reducer
from hpc_dl.reduce.guard import check_replicas
from hpc_dl.world import Call, Group

pytestmark = pytest.mark.timeout(120)

F32, F64 = np.dtype(np.float32), np.dtype(np.float64)
SIZES = [300_000, 7, 200_000, 1, 90_001, 0, 64_000, 12]
LAYOUT = plan(
    [Parameter(f"p{i}", (n,), F64 if i == 2 else F32) for i, n in enumerate(SIZES)], 1 << 20
)


@pytest.fixture(scope="module")
def comm() -> Iterator[Communicator]:
    comm, _ = make()
    yield comm
    comm.close()


def _gradient(name: str, size: int, rank: int, step: int) -> Any:
    return np.random.default_rng([int(name[1:]), rank, step]).standard_normal(size)


def _deliver(reducer: Reducer, rank: int, step: int) -> None:
    """Write the gradients of a step in an order that is another one on each rank."""
    views, place = reducer.views(), reducer.layout.place()
    for name in np.random.default_rng([rank, step]).permutation(list(place)):
        views[name][:] = _gradient(name, len(views[name]), rank, step)
        reducer.ready(place[name][0])


def _check(reducer: Reducer, ranks: list[int], size: int, step: int) -> None:
    """Compare with the average over ``size`` ranks, of which some gave zeros."""
    for name, view in reducer.views().items():
        total = sum(_gradient(name, len(view), r, step).astype(view.dtype) for r in ranks)
        np.testing.assert_allclose(view, total / size, 2e-6, 2e-6)


@pytest.mark.parametrize("layout", [LAYOUT, plan([Parameter("p0", (9,), F32)], 1 << 20)])
def test_steps(comm: Communicator, layout: Layout) -> None:
    reducer = Reducer(comm, layout)
    for step in range(4):
        _deliver(reducer, comm.rank, step)
        reducer.finish()
        _check(reducer, list(range(comm.size)), comm.size, step)
        # Every rank holds the same bytes.
        check_replicas(comm, reducer.views().items(), step)
    steps, sent, waited, dense = reducer.traffic()
    assert steps == 4
    assert sent == dense == 4 * (2 * (comm.size - 1) * layout.nbytes // comm.size)
    assert waited > 0


def test_several_reducers_in_turn(comm: Communicator) -> None:
    reducers = [Reducer(comm, LAYOUT, op) for op in (Op.AVERAGE, Op.SUM)]
    for step in range(2):
        for reducer in reducers:
            _deliver(reducer, comm.rank, step)
        for reducer in reducers:
            reducer.finish()
        average, total = (reducer.views()["p0"] for reducer in reducers)
        np.testing.assert_allclose(comm.size * average, total, 1e-5, 1e-5)


def test_joined_ranks_serve_the_steps_of_the_others(comm: Communicator) -> None:
    group = Group(comm)
    call = Call("reduce", "optimizer")
    reducer = Reducer(comm, LAYOUT, agree=lambda: group.agree(call))
    group.register("optimizer", reducer)
    if comm.negotiates:
        pytest.skip("Horovod matches buckets by name, which its adapter gives them")
    for step in range(1 + comm.rank):
        _deliver(reducer, comm.rank, step)
        reducer.finish()
        _check(reducer, [r for r in range(comm.size) if r >= step], comm.size, step)
    assert group.join() == comm.size - 1


def test_divergence_is_found(comm: Communicator) -> None:
    weights = {"first": np.ones(1000), "second": np.ones((3, 4), np.float32)}
    check_replicas(comm, weights.items(), 1)
    if comm.size == 1:
        pytest.skip("one replica cannot diverge")
    if comm.rank == comm.size - 1:
        weights["second"].view(np.uint32)[1, 2] ^= 1
    with pytest.raises(
        ReplicaDivergenceError, match=rf"first 'second', on rank\(s\) {comm.size - 1} against"
    ):
        check_replicas(comm, weights.items(), 1)
