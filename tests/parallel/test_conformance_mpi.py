"""The communicator over MPI passes the suites, on one node and on several.

One machine counts as several nodes through ``node_size``: one rank on each; and two on each,
which with three ranks makes nodes of different size.
"""

import gc
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import ClassVar

import numpy as np
import pytest

from hpc_dl.comm import Communicator, make
from hpc_dl.errors import HpcDlError, OptionError
from hpc_dl.testing.conformance import CommunicatorConformance, PointToPointConformance

if os.environ.get("HPC_DL_COMM", "mpi").partition(":")[0] != "mpi":
    pytest.skip("HPC_DL_COMM asks for another communicator", allow_module_level=True)

KB, MB = 1 << 10, 1 << 20


class Mpi(CommunicatorConformance, PointToPointConformance):
    node_size: ClassVar[int]

    @pytest.fixture(scope="class")
    @classmethod
    def comm(cls) -> Iterator[Communicator]:
        comm, _ = make(f"mpi:node_size={cls.node_size}")
        yield comm
        comm.close()


class TestOneNode(Mpi):
    node_size = 0
    thresholds = (64 * KB, 1 * MB, 3 * MB)

    @pytest.mark.parametrize("dtype", [np.float32, np.float64])
    def test_small_sums_follow_each_other_on_either_way(
        self, comm: Communicator, dtype: type
    ) -> None:
        """Slots are written again while ranks are late, and calls come at once or in turn."""
        generator = np.random.default_rng(comm.rank)
        works, arrays, expected = [], [], []
        for number in range(60):
            count = int(
                np.random.default_rng(number).integers(1, 64 * KB // np.dtype(dtype).itemsize)
            )
            x = np.full((1, count), comm.rank + number, dtype)
            expected.append(comm.size * (comm.size - 1) / 2 + comm.size * number)
            arrays.append(x)
            if generator.random() < 0.1:
                time.sleep(0.002)
            # By rank, so that ranks meet in one collective by different ways.
            if generator.random() < 0.5:
                works.append(comm.allreduce_async(x))
            else:
                comm.allreduce(x)
        for work in works:
            work.wait()
        for x, value in zip(arrays, expected, strict=True):
            assert np.all(x == value)


class TestNodesOfOne(Mpi):
    """Nothing but the wire: a gather up to 16 KB, then a ring of segments of 256 KB."""

    node_size = 1
    thresholds = (64 * KB, 512 * KB, 16 * KB)

    def test_nodes(self, comm: Communicator) -> None:
        assert (comm.local_size, comm.cross_size) == (1, comm.size)
        assert (comm.local_rank, comm.cross_rank) == (0, comm.rank)


class TestNodesOfTwo(Mpi):
    """In shared memory first, then over the wire, in pieces of 16 MB."""

    node_size = 2
    thresholds = (64 * KB, 1 * MB, 16 * MB)
    half_roundings = None  # one in each node, and one at each step of the ring

    @pytest.fixture(scope="class", autouse=True)
    @classmethod
    def several_nodes(cls, comm: Communicator) -> None:
        if comm.size < 3:
            pytest.skip(f"{comm.size} rank(s) are one node of two; this needs three")

    def test_nodes(self, comm: Communicator) -> None:
        assert comm.local_rank == comm.rank % 2
        assert comm.cross_rank == comm.rank // 2
        assert comm.homogeneous == (comm.size % 2 == 0)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("mpi:node_size=-1", "node_size=-1; valid: 0"),
        ("mpi:node_size=two", "node_size='?two'?; valid: 0"),
        ("mpi:cuda=never", "unknown value for option cuda 'never'; valid: auto, aware, error, st"),
    ],
)
def test_bad_options(spec: str, message: str) -> None:
    with pytest.raises(OptionError, match=message):
        make(spec)


def test_more_shared_memory_than_there_is() -> None:
    comm, _ = make("mpi")
    if comm.size == 1:
        pytest.skip("a rank alone on its node takes ordinary memory")
    with pytest.raises(HpcDlError, match=r"MiB of shared memory; /dev/shm has \d+ MiB free.*ipc"):
        comm.allocate(1 << 45)
    x = comm.allocate(4096).view(np.float32)
    x[:] = 1
    assert comm.allreduce(x)[0] == comm.size
    comm.close()


def test_shared_memory_goes_with_its_last_view() -> None:
    def windows() -> int:
        """Count the pieces of shared memory that this process maps."""
        return Path("/proc/self/maps").read_text().count("/hpc_dl.")

    def use_group() -> None:
        group = comm.split(0)
        assert group is not None
        x = group.allocate(1 << 16).view(np.float32)
        group.allreduce(x)
        group.allreduce(np.ones(100_000))
        assert (windows() > before) == (comm.size > 1)
        group.close()
        group.close()

    comm, _ = make("mpi")
    gc.collect()
    before = windows()
    for _ in range(3):
        use_group()
        gc.collect()
        assert windows() == before
    # What a caller has stays: gradients may lie there.
    kept = comm.allocate(1 << 16)
    kept[:] = 7
    comm.close()
    assert (kept == 7).all()


def test_world_of_an_mpi_communicator() -> None:
    from mpi4py import MPI

    import hpc_dl.world as world

    reverse = MPI.COMM_WORLD.Split(0, -MPI.COMM_WORLD.rank)
    world.init_framework(reverse)
    assert world.rank() == world.size() - 1 - MPI.COMM_WORLD.rank
    assert world.current().choice.reason == "an MPI communicator was given to init()"
    world.shutdown()
    # It was duplicated: the caller's is still there.
    assert reverse.allreduce(1) == reverse.size
    reverse.Free()
