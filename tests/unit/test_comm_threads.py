"""The communicator of threads passes the suites, and ends cleanly when a rank fails."""

import threading
import time

import numpy as np
import pytest

from hpc_dl.comm import ThreadsCommunicator
from hpc_dl.errors import HpcDlError
from hpc_dl.testing import run_threads
from hpc_dl.testing.conformance import CommunicatorConformance, PointToPointConformance
from hpc_dl.testing.conformance.suite import OnRanks

pytestmark = pytest.mark.timeout(60)


class TestThreads(CommunicatorConformance, PointToPointConformance):
    thresholds = (1 << 16, 1 << 18)

    @pytest.fixture(params=[1, 2, 3, 8])
    def on_ranks(self, request: pytest.FixtureRequest) -> OnRanks:
        return lambda check: run_threads(request.param, check)


def test_results_come_by_rank() -> None:
    assert run_threads(4, lambda comm: (comm.rank, comm.size)) == [(r, 4) for r in range(4)]


@pytest.mark.parametrize("size", [1, 2, 5])
@pytest.mark.parametrize("where", ["allreduce", "barrier", "recv", "irecv", "split", "async"])
def test_failure_of_one_rank_wakes_the_others(size: int, where: str) -> None:
    def rank_main(comm: ThreadsCommunicator) -> None:
        if comm.rank == size - 1:
            raise ZeroDivisionError("rank failed on purpose")
        if where == "allreduce":
            comm.allreduce(np.ones(3))
        elif where == "async":
            comm.allreduce_async(np.ones(3)).wait()
        elif where == "barrier":
            comm.barrier()
        elif where == "recv":
            comm.recv(np.ones(3))
        elif where == "irecv":
            comm.irecv(np.ones(3)).wait()
        else:
            comm.split(0)

    begin = time.monotonic()
    before = threading.active_count()
    with pytest.raises(ZeroDivisionError, match="on purpose"):
        run_threads(size, rank_main)
    assert time.monotonic() - begin < 5
    assert threading.active_count() == before


def test_failure_wakes_ranks_in_a_group_of_some() -> None:
    def rank_main(comm: ThreadsCommunicator) -> None:
        group = comm.split(0)
        assert group is not None
        inner = group.split(0)
        assert inner is not None
        comm.barrier()
        if comm.rank == 0:
            raise ZeroDivisionError
        inner.barrier()

    with pytest.raises(ZeroDivisionError):
        run_threads(3, rank_main)


def test_error_of_the_others_names_the_cause() -> None:
    seen = []

    def rank_main(comm: ThreadsCommunicator) -> None:
        if comm.rank == 0:
            raise ZeroDivisionError
        try:
            comm.barrier()
        except HpcDlError as error:
            seen.append(str(error))
            raise

    with pytest.raises(ZeroDivisionError):
        run_threads(2, rank_main)
    assert seen == ["rank 1: another rank of this group failed; its error is the cause"]
