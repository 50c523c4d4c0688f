"""The job that a process is part of: ranks, objects, process sets, join, and its end."""

import os
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest

import hpc_dl.world as world
from hpc_dl.errors import MismatchError, NotInitializedError, OptionError, RanksJoinedError
from hpc_dl.world import ProcessSet, Sum, global_process_set
from hpc_dl.world.collectives import (
    allgather_start,
    allreduce_now,
    allreduce_start,
    alltoall_start,
    barrier,
    broadcast_start,
    reducescatter_start,
)

pytestmark = pytest.mark.timeout(120)


@pytest.fixture(scope="module", autouse=True)
def _world() -> Iterator[None]:
    world.init_framework()
    yield
    world.shutdown()


def _over_horovod() -> bool:
    return world.current().comm.name == "horovod"


def _sum(x: Any, name: str | None = None, process_set: ProcessSet = global_process_set) -> Any:
    allreduce_now(x, Sum, 1.0, name, process_set)
    return x


def test_numbers() -> None:
    wanted = os.environ.get("HPC_DL_COMM", "auto").partition(":")[0]
    name = world.current().comm.name
    assert name == wanted or wanted == "auto"
    assert world.is_initialized()
    assert 0 <= world.rank() < world.size()
    assert world.size() == int(os.environ.get("OMPI_COMM_WORLD_SIZE", "1"))
    assert (world.local_rank(), world.local_size()) == (world.rank(), world.size())
    assert (world.cross_rank(), world.cross_size()) == (0, 1)
    assert world.is_homogeneous()
    assert world.mpi_enabled() == (name in ("mpi", "horovod"))
    assert isinstance(world.mpi_built(), bool)
    assert not world.gloo_enabled()


def test_init_again_changes_nothing() -> None:
    before = world.current()
    world.init_framework()
    assert world.current() is before


@pytest.mark.parametrize(
    "thing",
    [None, 0, "text", b"", {"lr": 0.1, "nested": [1, (2, {3})]}, np.arange(3), "x" * 300_000],
    ids=lambda thing: type(thing).__name__,
)
def test_objects_are_broadcast(thing: Any) -> None:
    for root in range(world.size()):
        mine = (root, thing) if world.rank() == root else "not this"
        got_root, got = world.broadcast_object(mine, root_rank=root)
        assert got_root == root
        assert type(got) is type(thing)
        np.testing.assert_array_equal(np.asarray(got), np.asarray(thing))


def test_objects_are_gathered() -> None:
    mine = {"rank": world.rank(), "data": list(range(10 * world.rank()))}
    everyone = world.allgather_object(mine)
    assert everyone == [{"rank": r, "data": list(range(10 * r))} for r in range(world.size())]


def test_collectives_with_a_handle() -> None:
    rank, size = world.rank(), world.size()
    x = np.full((size, 2), float(rank))
    everywhere = global_process_set
    reduced = x.copy()
    work = allreduce_start(reduced, Sum, 1.0, None, everywhere)
    gathered = allgather_start(x[: 1 + rank % 2], None, everywhere)
    scattered = reducescatter_start(x, Sum, 1.0, None, everywhere)
    exchanged = alltoall_start(x, None, None, everywhere)
    received = np.full(3, float(rank))
    broadcast = broadcast_start(received, size - 1, None, everywhere)
    came, rows = world.synchronize(exchanged)
    assert came[:, 0].tolist() == list(range(size))
    assert rows.tolist() == [1] * size
    broadcast.wait()
    assert (received == size - 1).all()
    assert world.synchronize(gathered).shape == (sum(1 + r % 2 for r in range(size)), 2)
    assert (world.synchronize(scattered) == sum(range(size))).all()
    assert world.synchronize(scattered).shape == (1, 2)
    work.wait()
    assert (reduced == sum(range(size))).all()
    assert world.poll(gathered)
    barrier(everywhere)


def test_different_shapes_are_a_mismatch_on_all_ranks() -> None:
    if world.size() == 1:
        pytest.skip("one rank agrees with itself")
    with pytest.raises(MismatchError, match=r"(?i)different.*(shape|dimension)"):
        _sum(np.ones(3 + world.rank() % 2), "shapes")
    assert _sum(np.ones(1), "after")[0] == world.size()


def test_different_names_are_a_mismatch_on_all_ranks() -> None:
    if world.size() == 1 or _over_horovod():
        pytest.skip("one rank agrees with itself; Horovod waits for calls with other names")
    last = world.size() - 1
    described = rf"rank 0: allreduce 'a'.*rank {last}: allreduce 'b', shape \(3\) float64"
    with pytest.raises(MismatchError, match=described):
        _sum(np.ones(3), "b" if world.rank() == last else "a")


def test_join_after_different_numbers_of_batches() -> None:
    rank, size = world.rank(), world.size()
    for step in range(2 * rank + 1):
        there = sum(1 for r in range(size) if 2 * r + 1 > step)
        assert (_sum(np.ones(4), f"batch.{step}") == there).all()
    assert world.current().group.join() == size - 1
    assert _sum(np.ones(4))[0] == size
    assert world.allgather_object(rank) == list(range(size))


def test_broadcast_while_a_rank_has_joined() -> None:
    if world.size() == 1 or _over_horovod():
        pytest.skip("one rank has joined with itself; Horovod says so in its own words")
    with pytest.raises(RanksJoinedError, match="before join"):
        world.current().group.join() if world.rank() == 0 else world.broadcast_object(1)


# --- process sets ---------------------------------------------------------------------------


def test_process_set() -> None:
    rank, size = world.rank(), world.size()
    if size == 1:
        pytest.skip("one rank has no other set than that of all ranks")
    members = list(range(0, size, 2))
    evens = world.add_process_set(members)
    assert evens.included() == (rank in members)
    assert evens.size() == len(members)
    assert evens.process_set_id not in (None, 0)
    if evens.included():
        assert evens.rank() == members.index(rank)
        assert (_sum(np.full(4, 1.0 + rank), None, evens) == sum(1 + r for r in members)).all()
        assert world.allgather_object(rank, process_set=evens) == members
        last = members[-1]
        mine = "from the last" if rank == last else None
        assert world.broadcast_object(mine, last, process_set=evens) == "from the last"
        if last + 1 < size or size > len(members):
            outsider = 1
            with pytest.raises(OptionError, match=rf"root_rank {outsider} is not in"):
                world.broadcast_object(None, outsider, process_set=evens)
    else:
        with pytest.raises(OptionError, match=f"rank {rank} is not in ProcessSet"):
            _sum(np.ones(1), None, evens)
    assert world.remove_process_set(evens)
    assert not world.remove_process_set(evens)
    with pytest.raises(NotInitializedError, match="not registered"):
        evens.group()
    assert _sum(np.ones(1))[0] == size


def test_the_set_of_all_ranks() -> None:
    assert global_process_set.process_set_id == 0
    assert global_process_set.included()
    assert (global_process_set.rank(), global_process_set.size()) == (world.rank(), world.size())
    assert not world.remove_process_set(global_process_set)


@pytest.mark.parametrize("ranks", [[], [-1], [0, 99]], ids=str)
def test_ranks_that_are_none(ranks: list[int]) -> None:
    with pytest.raises(OptionError, match=f"valid ranks are 0..{world.size() - 1}"):
        world.add_process_set(ranks)


def test_a_set_is_registered_once() -> None:
    with pytest.raises(OptionError, match=r"registered already.*ranks=all"):
        world.add_process_set(list(range(world.size())))
    if world.size() > 1:
        first = world.add_process_set([0])
        with pytest.raises(OptionError, match="registered already"):
            world.add_process_set(ProcessSet([0]))
        world.remove_process_set(first)


def test_ranks_must_give_the_same_set() -> None:
    if world.size() < 3:
        pytest.skip("needs three ranks to give two sets of some of them")
    with pytest.raises(MismatchError, match="gave different sets"):
        world.add_process_set([0] if world.rank() == 0 else [0, 1])


# --- the end --------------------------------------------------------------------------------

AFTER_THE_END: dict[str, Callable[[], Any]] = {
    "rank": world.rank,
    "size": world.size,
    "local_rank": world.local_rank,
    "is_homogeneous": world.is_homogeneous,
    "allreduce": lambda: _sum(np.ones(1)),
    "broadcast_object": world.broadcast_object,
    "allgather_object": lambda: world.allgather_object(1),
    "add_process_set": lambda: world.add_process_set([0]),
    "process set size": global_process_set.size,
}


def test_after_shutdown_everything_says_to_call_init() -> None:
    kept = None
    if world.size() > 1:
        kept = world.add_process_set([0])
    size = world.size()
    world.shutdown()
    world.shutdown()
    assert not world.is_initialized()
    for call in AFTER_THE_END.values():
        with pytest.raises(NotInitializedError, match=r"call init\(\) first"):
            call()
    if kept is not None:
        with pytest.raises(NotInitializedError, match="not registered"):
            kept.group()
    world.init_framework()
    assert _sum(np.ones(1))[0] == size


def test_world_of_some_ranks() -> None:
    """The first ranks have one job, and each of the others one of its own."""
    rank, size = world.rank(), world.size()
    part = list(range(max(1, size - 1)))
    world.shutdown()
    world.init_framework(part)
    if rank in part:
        assert (world.rank(), world.size()) == (rank, len(part))
    else:
        assert (world.rank(), world.size()) == (0, 1)
    assert _sum(np.ones(1))[0] == world.size()
    world.shutdown()
    with pytest.raises(OptionError, match=rf"valid ranks are 0\.\.{size - 1}"):
        world.init_framework([0, size])
    with pytest.raises(OptionError, match="give None, a spec"):
        world.init_framework(3.5)
    world.init_framework()
    assert world.size() == size
