"""Messages between two ranks, for communicators that have them."""

import time

import numpy as np
import pytest

from hpc_dl.comm import ANY, PointToPoint, Status
from hpc_dl.errors import HpcDlError, OptionError, UnsupportedError
from hpc_dl.testing.conformance.suite import OnRanks, Suite
from hpc_dl.testing.conformance.values import ALL, FLOATS, Dtype, values


def _probe(comm: PointToPoint, source: int = ANY, tag: int = ANY) -> Status:
    """Wait until ``iprobe`` finds a message."""
    deadline = time.monotonic() + 60
    while (status := comm.iprobe(source, tag)) is None:
        assert time.monotonic() < deadline, "no message came"
        time.sleep(0.001)
    return status


class PointToPointConformance(Suite):
    """``send``, ``recv``, ``isend``, ``irecv`` and ``iprobe``.

    Every test works with any number of ranks: alone, a rank sends to itself.
    """

    @pytest.mark.parametrize("dtype", ALL, ids=str)
    def test_around_a_ring(self, on_ranks: OnRanks, dtype: Dtype) -> None:
        def check(comm: PointToPoint) -> None:
            assert isinstance(comm, PointToPoint)
            right, left = (comm.rank + 1) % comm.size, (comm.rank - 1) % comm.size
            for shape in ((0,), (1,), (), (3, 5), (40_000,)):
                work = comm.isend(values(shape, dtype, comm.rank), right, tag=3)
                x = np.zeros(shape, dtype)
                status = comm.recv(x, left, tag=3)
                assert status == Status(left, 3, x.nbytes)
                np.testing.assert_array_equal(x, values(shape, dtype, left))
                work.wait()
                assert work.done()

        on_ranks(check)

    def test_send_and_recv(self, on_ranks: OnRanks) -> None:
        """Rank 0 starts, the others pass it on; large enough to need the receiver."""

        def check(comm: PointToPoint) -> None:
            x = np.arange(100_000.0)
            if comm.rank > 0:
                x[:] = 0
                comm.recv(x, comm.rank - 1)
                x += 1
            if comm.rank + 1 < comm.size:
                comm.send(x, comm.rank + 1)
            np.testing.assert_array_equal(x, np.arange(100_000.0) + comm.rank)

        on_ranks(check)

    def test_any_source_any_tag(self, on_ranks: OnRanks) -> None:
        def check(comm: PointToPoint) -> None:
            works = [
                comm.isend(np.array([comm.rank, dest]), dest, tag=comm.rank)
                for dest in range(comm.size)
            ]
            sources = set()
            for _ in range(comm.size):
                x = np.zeros(2, np.int64)
                status = comm.recv(x)
                assert status == Status(int(x[0]), int(x[0]), 16)
                assert x[1] == comm.rank
                sources.add(status.source)
            assert sources == set(range(comm.size))
            for work in works:
                work.wait()

        on_ranks(check)

    def test_messages_of_one_tag_keep_their_order(self, on_ranks: OnRanks) -> None:
        def check(comm: PointToPoint) -> None:
            dest, source = (comm.rank + 1) % comm.size, (comm.rank - 1) % comm.size
            works = [comm.isend(np.array([n]), dest, tag=n % 2) for n in range(20)]
            x = np.zeros(1, np.int64)
            for tag in (1, 0):  # the tags in the other order than they were sent
                for n in range(tag, 20, 2):
                    comm.recv(x, source, tag)
                    assert x[0] == n
            for work in works:
                work.wait()

        on_ranks(check)

    def test_receives_are_served_in_the_order_they_were_started(self, on_ranks: OnRanks) -> None:
        def check(comm: PointToPoint) -> None:
            dest, source = (comm.rank + 1) % comm.size, (comm.rank - 1) % comm.size
            rooms = [np.zeros(1, np.int64) for _ in range(4)]
            receives = [comm.irecv(room, source, 5) for room in rooms[:2]]
            receives += [comm.irecv(room, ANY, ANY) for room in rooms[2:]]
            comm.barrier()
            works = [comm.isend(np.array([n]), dest, tag=5) for n in range(4)]
            for n in (3, 1, 0, 2):
                assert receives[n].wait() == Status(source, 5, 8)
                assert receives[n].done()
                assert rooms[n][0] == n
            for work in works:
                work.wait()
            comm.barrier()

        on_ranks(check)

    def test_probe(self, on_ranks: OnRanks) -> None:
        def check(comm: PointToPoint) -> None:
            dest, source = (comm.rank + 1) % comm.size, (comm.rank - 1) % comm.size
            assert comm.iprobe() is None
            comm.barrier()
            work = comm.isend(np.ones(5), dest, tag=9)
            assert _probe(comm) == Status(source, 9, 40)
            assert _probe(comm, source, 9) == Status(source, 9, 40)
            assert comm.iprobe(source, 8) is None
            comm.recv(np.zeros(5), source, 9)
            work.wait()
            comm.barrier()
            assert comm.iprobe() is None
            comm.barrier()

        on_ranks(check)

    def test_short_message_fills_the_front(self, on_ranks: OnRanks) -> None:
        def check(comm: PointToPoint) -> None:
            dest = (comm.rank + 1) % comm.size
            work = comm.isend(np.array([1.0, 2.0]), dest)
            x = np.full(4, -1.0)
            assert comm.recv(x).nbytes == 16
            assert x.tolist() == [1, 2, -1, -1]
            work.wait()

        on_ranks(check)

    @pytest.mark.parametrize("length", [10, 1000, 100_000])
    def test_long_message_is_an_error(self, on_ranks: OnRanks, length: int) -> None:
        def check(comm: PointToPoint) -> None:
            dest = (comm.rank + 1) % comm.size
            work = comm.isend(np.ones(length), dest)
            memory = np.zeros(2 + length)
            with pytest.raises(OptionError, match=r"room for 16 bytes.*iprobe"):
                comm.recv(memory[:2])
            assert not memory[2:].any()
            work.wait()
            comm.barrier()

        on_ranks(check)

    def test_long_message_is_an_error_for_irecv(self, on_ranks: OnRanks) -> None:
        def check(comm: PointToPoint) -> None:
            dest = (comm.rank + 1) % comm.size
            work = comm.isend(np.ones(10), dest)
            memory = np.zeros(12)
            receive = comm.irecv(memory[:2])
            for _ in range(2):
                with pytest.raises(OptionError, match=r"room for 16 bytes.*iprobe"):
                    receive.wait()
            assert receive.done()
            assert not memory[2:].any()
            work.wait()
            comm.barrier()

        on_ranks(check)

    def test_strides(self, on_ranks: OnRanks) -> None:
        """What is sent is copied where it is not contiguous; what is received into must be."""

        def check(comm: PointToPoint) -> None:
            dest = (comm.rank + 1) % comm.size
            work = comm.isend(np.arange(6.0).reshape(2, 3).T, dest)
            x = np.zeros((3, 2))
            comm.recv(x)
            np.testing.assert_array_equal(x, np.arange(6.0).reshape(2, 3).T)
            work.wait()
            with pytest.raises(UnsupportedError, match="contiguous"):
                comm.irecv(x.T)
            comm.barrier()

        on_ranks(check)

    def test_sent_memory_may_be_reused_after_the_wait(self, on_ranks: OnRanks) -> None:
        def check(comm: PointToPoint) -> None:
            dest = (comm.rank + 1) % comm.size
            x, y = np.zeros(50_000), np.zeros(50_000)
            for n in range(5):
                x[:] = n
                receive = comm.irecv(y)
                comm.isend(x, dest).wait()
                x[:] = -1
                receive.wait()
                assert (y == n).all()

        on_ranks(check)

    def test_wrong_addresses(self, on_ranks: OnRanks) -> None:
        def check(comm: PointToPoint) -> None:
            x = np.zeros(1)
            for call in (
                lambda: comm.send(x, comm.size),
                lambda: comm.isend(x, -1),
                lambda: comm.recv(x, comm.size),
                lambda: comm.irecv(x, -2),
                lambda: comm.iprobe(comm.size),
            ):
                with pytest.raises(OptionError, match=r"valid: 0\.\."):
                    call()
            for call in (
                lambda: comm.isend(x, 0, -1),
                lambda: comm.irecv(x, 0, -2),
                lambda: comm.iprobe(0, -3),
            ):
                with pytest.raises(OptionError, match=r"tag -. .* valid: 0 or more"):
                    call()

        on_ranks(check)

    def test_groups_have_messages_of_their_own(self, on_ranks: OnRanks) -> None:
        def check(comm: PointToPoint) -> None:
            group = comm.split(0)
            assert isinstance(group, PointToPoint)
            dest, source = (comm.rank + 1) % comm.size, (comm.rank - 1) % comm.size
            works = [group.isend(np.array([1]), dest, 4), comm.isend(np.array([2]), dest, 4)]
            x = np.zeros(1, np.int64)
            comm.recv(x, source, 4)
            assert x[0] == 2
            group.recv(x, source, 4)
            assert x[0] == 1
            for work in works:
                work.wait()
            group.close()

        on_ranks(check)

    def test_messages_and_collectives_do_not_disturb_each_other(self, on_ranks: OnRanks) -> None:
        def check(comm: PointToPoint) -> None:
            dest = (comm.rank + 1) % comm.size
            total = comm.size * (comm.size - 1) / 2
            for _ in range(3):
                y = np.zeros(30_000)
                receive = comm.irecv(y, tag=6)
                work = comm.allreduce_async(np.full(30_000, float(comm.rank)))
                sending = comm.isend(values((30_000,), FLOATS[1], comm.rank), dest, 6)
                assert (work.wait() == total).all()
                receive.wait()
                sending.wait()
                left = (comm.rank - 1) % comm.size
                np.testing.assert_array_equal(y, values((30_000,), FLOATS[1], left))

        on_ranks(check)

    def test_error_is_one_of_ours(self, on_ranks: OnRanks) -> None:
        def check(comm: PointToPoint) -> None:
            with pytest.raises(HpcDlError):
                comm.send(np.array([object()]), 0)

        on_ranks(check)
