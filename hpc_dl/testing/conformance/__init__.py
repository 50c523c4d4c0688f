"""Suites that every communicator must pass; authors of one inherit them in their tests.

A class of tests names the communicator, and pytest does the rest::

    from hpc_dl.testing.conformance import CommunicatorConformance

    class TestMine(CommunicatorConformance):
        @pytest.fixture(scope="class")
        @classmethod
        def comm(cls):
            comm = MyCommunicator()
            yield comm
            comm.close()

Each process is one rank: start pytest with mpirun, with any number of ranks. Where several
ranks live in one process override ``on_ranks`` instead of ``comm``; ``threads`` does so::

    class TestThreads(CommunicatorConformance):
        @pytest.fixture(params=[1, 2, 3, 8])
        def on_ranks(self, request):
            return lambda check: run_threads(request.param, check)
"""

import pytest

pytest.register_assert_rewrite(
    *(
        f"{__name__}.{module}"
        for module in (
            "allocated",
            "allreduce",
            "asynchronous",
            "gathers",
            "groups",
            "halves",
            "messages",
            "refusals",
            "suite",
        )
    )
)

from hpc_dl.testing.conformance.allocated import AllocatedConformance  # noqa: E402
from hpc_dl.testing.conformance.allreduce import AllreduceConformance  # noqa: E402
from hpc_dl.testing.conformance.asynchronous import AsynchronousConformance  # noqa: E402
from hpc_dl.testing.conformance.gathers import GathersConformance  # noqa: E402
from hpc_dl.testing.conformance.groups import GroupsConformance  # noqa: E402
from hpc_dl.testing.conformance.halves import HalvesConformance  # noqa: E402
from hpc_dl.testing.conformance.messages import PointToPointConformance  # noqa: E402
from hpc_dl.testing.conformance.refusals import RefusalsConformance  # noqa: E402


class CommunicatorConformance(
    AllreduceConformance,
    HalvesConformance,
    AllocatedConformance,
    GathersConformance,
    AsynchronousConformance,
    GroupsConformance,
    RefusalsConformance,
):
    """All that the protocol ``Communicator`` promises."""


__all__ = ["CommunicatorConformance", "PointToPointConformance"]
