"""What all suites share: how a check runs on all ranks, and what the author may declare."""

import zlib
from collections.abc import Callable
from typing import Any, ClassVar

import numpy as np
import pytest

from hpc_dl.comm import Communicator
from hpc_dl.comm.protocol import Array

#: Runs a check on every rank of this process.
OnRanks = Callable[[Callable[[Any], None]], object]


class Suite:
    """The declarations of a communicator's author, and the fixture that all tests use."""

    thresholds: ClassVar[tuple[int, ...]] = (1 << 16,)
    """Bytes at which an all-reduce takes another path; tested just below, at and above.

    The first two are tested with more types and ops than those that follow: give these first.
    """
    adasum: ClassVar[bool] = False
    """Whether ``op=adasum`` is available (at a power of two of ranks)."""
    nests: ClassVar[bool] = True
    """Whether a group that was split off can be split again."""
    orders_by_key: ClassVar[bool] = True
    """Whether ``split`` orders the ranks of a group by their keys."""
    spreads_nan: ClassVar[bool] = True
    """Whether min and max return NaN where any rank has NaN."""
    half_roundings: ClassVar[int | None] = 1
    """How often a sum of 16-bit floats is rounded; None: at each addition."""

    @pytest.fixture
    def on_ranks(self, comm: Communicator) -> OnRanks:
        """Run a check on this process's rank; override it where a process has several."""

        def run(check: Callable[[Any], None]) -> None:
            check(comm)
            # A message of the next test must not meet a receive of this one that takes any.
            comm.barrier()

        return run


def assert_same_everywhere(comm: Communicator, array: Array) -> None:
    """Fail unless all ranks hold the same bytes."""
    digest = np.array([zlib.crc32(np.ascontiguousarray(array).tobytes()), array.size], np.int64)
    table = comm.exchange(digest)
    assert (table == table[0]).all(), "ranks got different bytes"
