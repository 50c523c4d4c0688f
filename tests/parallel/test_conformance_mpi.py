"""The communicator over MPI passes the suites, on one node and on several.

One machine counts as several nodes through ``node_size``: one rank on each; and two on each,
which with three ranks makes nodes of different size.
"""

import os
from collections.abc import Iterator
from typing import ClassVar

import pytest

from hpc_dl.comm import Communicator, make
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
    half_roundings = 2  # for a node, and for all nodes

    @pytest.fixture(scope="class", autouse=True)
    @classmethod
    def several_nodes(cls, comm: Communicator) -> None:
        if comm.size < 3:
            pytest.skip(f"{comm.size} rank(s) are one node of two; this needs three")

    def test_nodes(self, comm: Communicator) -> None:
        assert comm.local_rank == comm.rank % 2
        assert comm.cross_rank == comm.rank // 2
        assert comm.homogeneous == (comm.size % 2 == 0)
