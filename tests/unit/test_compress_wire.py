"""The bytes an exchange reports are those it hands to the communicator, and those of theory."""

from typing import Any

import numpy as np
import pytest

from hpc_dl.comm import Communicator
from hpc_dl.compress import Sparsifier, Unit, make, names
from hpc_dl.reduce.exchange import make_exchange
from hpc_dl.testing import run_threads

UNIT = Unit.single("x", (256, 256))
RANKS = (2, 3, 4)
#: Bytes that ranks agree with, such as a number of entries; they do not grow with the gradient.
AGREEMENT = 64


class Counting:
    """A communicator that counts what its collectives make a rank send."""

    def __init__(self, comm: Communicator):
        self._comm = comm
        self.sent = 0.0

    def __getattr__(self, name: str) -> Any:
        if name in ("reduce_scatter", "broadcast", "send", "isend", "allreduce_async"):
            raise AssertionError(f"{name} is not counted")
        return getattr(self._comm, name)

    def allreduce(self, x: Any, *args: Any, **options: Any) -> Any:
        """A ring sends each part of the buffer 2 (n - 1) times, n parts in all."""
        self.sent += 2 * (self._comm.size - 1) / self._comm.size * x.nbytes
        return self._comm.allreduce(x, *args, **options)

    def allgather(self, x: Any) -> Any:
        """Its own part goes to each of the others."""
        self.sent += (self._comm.size - 1) * x.nbytes
        return self._comm.allgather(x)

    def alltoall(self, parts: Any) -> Any:
        """Each part goes to its rank, but for one."""
        self.sent += sum(p.nbytes for rank, p in enumerate(parts) if rank != self._comm.rank)
        return self._comm.alltoall(parts)


def sent_of(spec: str, size: int) -> list[tuple[float, float]]:
    """Return what each rank reports and what it sent, once warmed up."""

    def main(comm: Communicator) -> tuple[float, float]:
        counting = Counting(comm)
        exchange = make_exchange(counting, UNIT, make(spec))  # type: ignore[arg-type]
        rng = np.random.default_rng(comm.rank)
        reported = 0
        for number in (1 << 20, (1 << 20) + 1):
            counting.sent = 0.0
            reported = exchange.run(rng.standard_normal(UNIT.size).astype(np.float32), number)
        return reported, counting.sent

    return run_threads(size, main)


@pytest.mark.parametrize("size", RANKS)
@pytest.mark.parametrize("spec", names())
def test_what_is_reported_is_what_is_sent(spec: str, size: int) -> None:
    for reported, sent in sent_of(spec, size):
        assert reported <= sent <= reported + AGREEMENT


@pytest.mark.parametrize("spec", [name for name in names() if name != "threshold"])
def test_what_is_sent_is_at_most_a_twentieth_more_than_theory(spec: str) -> None:
    size = 4
    compressor = make(spec).compressor
    payload = compressor.payload_bytes(UNIT, size)
    two_phase = not isinstance(compressor, Sparsifier) or size * payload > UNIT.size * 4
    theory = payload * (2 * (size - 1) / size if two_phase else size - 1)
    total = sum(sent for _, sent in sent_of(spec, size))
    assert total <= size * theory / 0.95
