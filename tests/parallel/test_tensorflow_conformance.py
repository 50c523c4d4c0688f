"""The communicator over Horovod's build for TensorFlow passes the suite."""

import os
from collections.abc import Iterator

import pytest

from hpc_dl.comm import Communicator, make
from hpc_dl.testing.conformance import CommunicatorConformance

if os.environ.get("HPC_DL_COMM") != "horovod":
    pytest.skip("HPC_DL_COMM asks for another communicator", allow_module_level=True)


class TestHorovod(CommunicatorConformance):
    adasum = True
    nests = False
    orders_by_key = False
    spreads_nan = False
    half_roundings = None

    @pytest.fixture(scope="class")
    @classmethod
    def comm(cls) -> Iterator[Communicator]:
        comm, _ = make("horovod", "tensorflow")
        yield comm
        comm.close()
