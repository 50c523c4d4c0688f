"""The communicator of one process passes the suite."""

from collections.abc import Iterator

import numpy as np
import pytest

from hpc_dl.comm import Communicator, PointToPoint, SerialCommunicator
from hpc_dl.testing.conformance import CommunicatorConformance

pytestmark = pytest.mark.timeout(60)


class TestSerial(CommunicatorConformance):
    @pytest.fixture
    def comm(self) -> Iterator[Communicator]:
        comm = SerialCommunicator()
        yield comm
        comm.close()


def test_has_no_messages() -> None:
    """A strategy asks for messages by this type, and must not be told that there are any."""
    assert not isinstance(SerialCommunicator(), PointToPoint)


def test_scale_of_a_half_is_not_rounded_to_a_half() -> None:
    """1e-5 as a float16 is off by 2 %."""
    x = SerialCommunicator().allreduce(np.full(3, 1000, np.float16), scale=1e-5)
    np.testing.assert_array_equal(x, np.float16(0.01))
