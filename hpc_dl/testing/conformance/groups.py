"""Ranks and sizes, barriers, and groups of some of the ranks."""

import time

import numpy as np
import pytest

from hpc_dl.comm import Communicator, Op
from hpc_dl.errors import HpcDlError, OptionError
from hpc_dl.testing.conformance.suite import OnRanks, Suite


def _sum_of(comm: Communicator, value: float, length: int = 3) -> float:
    """Return the sum of every rank's ``value``, after checking all elements."""
    x = comm.allreduce(np.full(length, value))
    assert (x == x[0]).all()
    return float(x[0])


class GroupsConformance(Suite):
    """``barrier``, ``split`` and the numbers of ranks."""

    def test_numbers(self, on_ranks: OnRanks) -> None:
        def check(comm: Communicator) -> None:
            assert isinstance(comm, Communicator)
            assert 0 <= comm.rank < comm.size
            assert 0 <= comm.local_rank < comm.local_size <= comm.size
            assert 0 <= comm.cross_rank < comm.cross_size <= comm.size
            row = np.array([comm.rank, comm.local_rank, comm.local_size, comm.cross_rank])
            table = comm.exchange(row)
            assert table[:, 0].tolist() == list(range(comm.size))
            assert comm.homogeneous == (len(set(table[:, 2].tolist())) == 1)
            # One rank of each local rank on each node, so these pairs are all different.
            assert len({(int(local), int(cross)) for _, local, _, cross in table}) == comm.size

        on_ranks(check)

    def test_barrier_waits_for_the_last(self, on_ranks: OnRanks) -> None:
        def check(comm: Communicator) -> None:
            comm.barrier()
            begin = time.monotonic()
            if comm.rank == comm.size - 1:
                time.sleep(0.3)
            comm.barrier()
            assert time.monotonic() - begin > 0.2

        on_ranks(check)

    @pytest.mark.parametrize("length", [3, 50_000])
    def test_split_by_parity(self, on_ranks: OnRanks, length: int) -> None:
        def check(comm: Communicator) -> None:
            group = comm.split(comm.rank % 2)
            assert group is not None
            members = range(comm.rank % 2, comm.size, 2)
            assert (group.rank, group.size) == (comm.rank // 2, len(members))
            assert _sum_of(group, comm.rank, length) == sum(members)
            gathered = group.allgather(np.array([comm.rank]))
            assert [int(g[0]) for g in gathered] == list(members)
            assert _sum_of(comm, 1, length) == comm.size
            for root, member in enumerate(members):
                assert group.broadcast(np.array([comm.rank]), root)[0] == member
            memory = group.allocate(8 * length).view(np.float64)
            memory[:] = comm.rank
            assert (group.allreduce(memory, Op.MAX) == max(members)).all()
            group.barrier()
            group.close()
            assert _sum_of(comm, 1) == comm.size

        on_ranks(check)

    def test_without_color_there_is_no_group(self, on_ranks: OnRanks) -> None:
        def check(comm: Communicator) -> None:
            inside = comm.rank > 0 or comm.size == 1
            group = comm.split(7 if inside else None)
            assert (group is not None) == inside
            if group is not None:
                assert group.size == max(1, comm.size - 1)
                assert _sum_of(group, 1) == group.size
                group.close()
            assert comm.split(None) is None
            assert _sum_of(comm, 1) == comm.size

        on_ranks(check)

    def test_keys_order_the_ranks(self, on_ranks: OnRanks) -> None:
        def check(comm: Communicator) -> None:
            if not self.orders_by_key and comm.size > 1:
                with pytest.raises(HpcDlError, match="key"):
                    comm.split(0, key=-comm.rank)
                return
            group = comm.split(0, key=-comm.rank)
            assert group is not None
            assert group.rank == comm.size - 1 - comm.rank
            order = [int(g[0]) for g in group.allgather(np.array([comm.rank]))]
            assert order == list(reversed(range(comm.size)))
            assert group.broadcast(np.array([comm.rank]), 0)[0] == comm.size - 1
            group.close()

        on_ranks(check)

    def test_group_of_a_group(self, on_ranks: OnRanks) -> None:
        def check(comm: Communicator) -> None:
            half = comm.split(int(comm.rank >= comm.size // 2))
            assert half is not None
            if not self.nests and half.size < comm.size:
                with pytest.raises(HpcDlError, match="split"):
                    half.split(0)
            else:
                alone = half.split(half.rank)
                assert alone is not None
                assert (alone.rank, alone.size) == (0, 1)
                assert _sum_of(alone, comm.rank, 50_000) == comm.rank
                alone.close()
            half.close()
            assert _sum_of(comm, 1) == comm.size

        on_ranks(check)

    def test_groups_work_at_the_same_time(self, on_ranks: OnRanks) -> None:
        def check(comm: Communicator) -> None:
            group = comm.split(comm.rank % 2)
            assert group is not None
            inner = [group.allreduce_async(np.full(5000, 1.0)) for _ in range(4)]
            outer = [comm.allreduce_async(np.full(5000, 1.0)) for _ in range(4)]
            assert all((work.wait() == comm.size).all() for work in outer)
            assert all((work.wait() == group.size).all() for work in inner)
            group.close()

        on_ranks(check)

    def test_a_group_of_all_ranks_is_told_apart(self, on_ranks: OnRanks) -> None:
        """Also where two threads make the calls, on every other rank in the other order."""

        def check(comm: Communicator) -> None:
            group = comm.split(0)
            assert group is not None
            both = (comm, 1.0), (group, 10.0)
            for i in range(4):
                in_order = both if (comm.rank + i) % 2 else both[::-1]
                works = [(c.allreduce_async(np.full(500, v)), v) for c, v in in_order]
                assert all((work.wait() == v * comm.size).all() for work, v in works)
            group.close()

        on_ranks(check)

    def test_negative_color(self, on_ranks: OnRanks) -> None:
        def check(comm: Communicator) -> None:
            with pytest.raises(OptionError, match="color -1; valid: 0 or more"):
                comm.split(-1)
            assert _sum_of(comm, 1) == comm.size

        on_ranks(check)
