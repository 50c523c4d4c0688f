"""Ranks that agree on each call: mismatches, and ranks that have run out of batches."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from hpc_dl.arrays import Parameter, plan
from hpc_dl.comm import Communicator, Op
from hpc_dl.errors import MismatchError, RanksJoinedError
from hpc_dl.reduce import Reducer
from hpc_dl.testing import run_threads
from hpc_dl.world import Call, Group

pytestmark = pytest.mark.timeout(60)

Main = Callable[[Group, Communicator], Any]


def _run(size: int, main: Main) -> list[Any]:
    return run_threads(size, lambda comm: main(Group(comm), comm))


def _sum(group: Group, x: Any, name: str | None = None, op: Op = Op.SUM) -> Any:
    """All-reduce as the adapters do."""
    call = Call("allreduce", group.name("allreduce", name), x.shape, x.dtype.name, op.value)
    group.run(call, lambda: group.comm.allreduce(x, op))
    return x


def _start_or_run(group: Group, call: Call, asynchronous: bool = False) -> None:
    """Try a call that is not to be made."""
    if asynchronous:
        group.start(call, lambda: pytest.fail("the call was made")).wait()
    else:
        group.run(call, lambda: pytest.fail("the call was made"))


BASE = Call("allreduce", "w", (3, 2), "float32", "sum", 1.0)
OTHERS = {
    "what": (BASE._replace(what="barrier"), "barrier 'w'"),
    "name": (BASE._replace(name="v"), "allreduce 'v'"),
    "shape": (BASE._replace(shape=(2, 3)), r"shape \(2, 3\) float32"),
    "dtype": (BASE._replace(dtype="float64"), r"shape \(3, 2\) float64"),
    "op": (BASE._replace(op="max"), "op max"),
    "scale": (BASE._replace(scale=0.5), "op sum scale 0.5"),
    "root": (BASE._replace(what="broadcast", root=1), "root 1"),
}


@pytest.mark.parametrize("field", OTHERS)
@pytest.mark.parametrize("size", [2, 3])
@pytest.mark.parametrize("asynchronous", [False, True])
def test_mismatch_names_both_calls_on_all_ranks(field: str, size: int, asynchronous: bool) -> None:
    other, described = OTHERS[field]
    mine_says = r"rank 0: allreduce 'w', shape \(3, 2\) float32, op sum; "

    def main(group: Group, comm: Communicator) -> None:
        call = other if comm.rank == size - 1 else BASE
        with pytest.raises(MismatchError, match=f"{mine_says}rank {size - 1}: .*{described}"):
            _start_or_run(group, call, asynchronous)
        assert _sum(group, np.ones(2), "next")[0] == size

    _run(size, main)


def test_sizes_that_may_differ_are_no_mismatch() -> None:
    def main(group: Group, comm: Communicator) -> None:
        call = Call("allgather", "rows", (None, 2), "float64")
        parts = group.run(call, lambda: comm.allgather(np.ones((comm.rank, 2))))
        assert [len(part) for part in parts] == [0, 1, 2]

    _run(3, main)


def test_names_that_are_not_given_count_calls_of_each_kind() -> None:
    group = Group(run_threads(1, lambda comm: comm)[0])
    assert [group.name("a", None), group.name("b", None), group.name("a", None)] == [
        "a.noname.1",
        "b.noname.1",
        "a.noname.2",
    ]
    assert group.name("a", "mine") == "mine"


@pytest.mark.parametrize("size", [1, 2, 3, 5])
def test_join_with_different_numbers_of_calls(size: int) -> None:
    """Rank r makes 3 r calls: those that have joined count as zeros, and the last one is told."""

    def main(group: Group, comm: Communicator) -> int:
        for step in range(3 * comm.rank):
            x = _sum(group, np.full((2, 2), 1.0 + comm.rank))
            there = [r for r in range(size) if 3 * r > step]
            assert (x == sum(1.0 + r for r in there)).all()
        last = group.join()
        # Afterwards all go on together, and calls without names match again.
        assert _sum(group, np.ones(1))[0] == size
        return last

    assert _run(size, main) == [size - 1] * size


def test_join_again_and_again() -> None:
    def main(group: Group, comm: Communicator) -> list[int]:
        last = []
        for epoch in range(3):
            batches = 1 + (comm.rank + epoch) % 3
            for _ in range(batches):
                _sum(group, np.ones(3))
            last.append(group.join())
        return last

    # The rank with three batches in each epoch.
    assert _run(3, main) == [[2, 1, 0]] * 3


def test_joined_ranks_serve_all_that_they_can() -> None:
    def main(group: Group, comm: Communicator) -> None:
        if comm.rank == 0:
            group.join()
            return
        rows = np.full((2, 3), float(comm.rank), np.float32)
        call = Call("allgather", "g", (None, 3), "float32")
        parts = group.run(call, lambda: comm.allgather(rows))
        assert [part.shape for part in parts] == [(0, 3), (2, 3), (2, 3)]
        call = Call("alltoall", "a", (None, 3), "float32")
        came = group.run(call, lambda: comm.alltoall([rows] * 3))
        assert [part.shape for part in came] == [(0, 3), (2, 3), (2, 3)]
        group.run(Call("barrier", "b"), comm.barrier)
        half = np.ones(5, "bfloat16")
        assert (_sum(group, half).astype(float) == 2).all()
        assert not group.all_present()
        group.join()

    _run(3, main)


def test_all_present_when_none_has_joined() -> None:
    assert _run(3, lambda group, comm: group.all_present()) == [True] * 3


@pytest.mark.parametrize("what", ["broadcast", "reducescatter", "allgather_object", "plan"])
def test_what_joined_ranks_cannot_serve_is_an_error_on_all_ranks(what: str) -> None:
    def main(group: Group, comm: Communicator) -> None:
        with pytest.raises(RanksJoinedError, match=f"{what} 'x'.* before join"):
            group.join() if comm.rank == 0 else _start_or_run(group, Call(what, "x"))

    _run(3, main)


def test_mismatch_among_those_that_have_not_joined() -> None:
    def main(group: Group, comm: Communicator) -> None:
        with pytest.raises(MismatchError, match=r"rank 1: allreduce 'r1'.*rank 2: allreduce 'r2'"):
            group.join() if comm.rank == 0 else _sum(group, np.ones(3), f"r{comm.rank}")

    _run(3, main)


def test_joined_rank_without_the_reducer_says_so() -> None:
    def main(group: Group, comm: Communicator) -> None:
        if comm.rank == 0:
            with pytest.raises(MismatchError, match=r"cannot serve 'adam'.*at least one step"):
                group.join()
            raise ZeroDivisionError("end the others")
        group.run(Call("reduce", "adam"), comm.barrier)

    with pytest.raises(ZeroDivisionError):
        _run(2, main)


def test_join_serves_reducers() -> None:
    """Two optimizers: ranks end their epochs after different numbers of steps."""
    layout = plan([Parameter("w", (1000,), np.dtype(np.float32))], 1 << 20)

    def main(group: Group, comm: Communicator) -> None:
        reducers = []
        for name in ("one", "two"):
            call = Call("reduce", name)
            reducer = Reducer(comm, layout, agree=lambda call=call: group.agree(call))
            group.register(name, reducer)
            reducers.append(reducer)
        for step in range(1 + comm.rank):
            for reducer in reducers:
                reducer.views()["w"][:] = 3.0
                reducer.ready(0)
                reducer.finish()
                there = sum(1 for r in range(comm.size) if r >= step)
                np.testing.assert_allclose(reducer.views()["w"], 3.0 * there / comm.size, 1e-6)
        assert group.join() == comm.size - 1

    _run(3, main)


def test_counter_counts_alike_after_a_join() -> None:
    def main(group: Group, comm: Communicator) -> int:
        count = group.counter("steps")
        for _ in range(1 + 2 * comm.rank):
            _sum(group, np.ones(1))
            count()
        group.join()
        return count()

    assert _run(3, main) == [6, 6, 6]
