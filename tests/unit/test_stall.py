"""The watch for stalls: a late rank is reported by name, and only then."""

import logging
import threading
import time

import numpy as np
import pytest

from hpc_dl.comm import ThreadsCommunicator, stall
from hpc_dl.comm.stall import Arrivals, Watch
from hpc_dl.testing import run_threads

pytestmark = pytest.mark.timeout(60)


def _stall(size: int, late: int, seconds: float, warn: float) -> None:
    """Let one rank come late to an all-reduce of 5 float32."""

    def rank_main(comm: ThreadsCommunicator) -> None:
        comm.watch.warn_seconds = warn
        comm.barrier()
        if comm.rank == late:
            time.sleep(seconds)
        comm.allreduce(np.ones(5, np.float32))

    run_threads(size, rank_main)


def test_late_rank_is_named(caplog: pytest.LogCaptureFixture) -> None:
    _stall(3, late=1, seconds=1.0, warn=0.2)
    messages = [record.getMessage() for record in caplog.records]
    assert {message[:6] for message in messages} == {"rank 0", "rank 2"}
    for message in messages:
        assert "in allreduce(5,) float32 over 'threads': rank(s) 1 have not called it" in message
        assert "Usual causes: a collective inside `if rank() == 0`" in message


def test_each_doubling_is_reported_once(caplog: pytest.LogCaptureFixture) -> None:
    _stall(2, late=1, seconds=1.6, warn=0.2)
    # At about 0.2, 0.4 and 0.8 s, or a little later on a busy machine.
    assert 2 <= len(caplog.records) <= 4


@pytest.mark.parametrize("warn", [0.0, 30.0], ids=["never", "later"])
def test_no_report(caplog: pytest.LogCaptureFixture, warn: float) -> None:
    _stall(2, late=1, seconds=0.6, warn=warn)
    assert not caplog.records


def test_collectives_that_go_on_are_not_a_stall(caplog: pytest.LogCaptureFixture) -> None:
    """Each is short; only together do they take longer than the limit."""

    def rank_main(comm: ThreadsCommunicator) -> None:
        comm.watch.warn_seconds = 0.4
        end = time.monotonic() + 1.0
        while comm.allreduce(np.array([float(time.monotonic() < end)]))[0] == 2:
            pass

    run_threads(2, rank_main)
    assert not caplog.records


def test_report_where_nothing_is_known_of_the_others(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    ended = threading.Event()
    monkeypatch.setattr(stall, "end_job", lambda code: ended.set())
    watch = Watch("horovod", rank=2, size=4)
    watch.warn_seconds, watch.abort_seconds = 0.1, 0.3
    watch.begin("barrier", np.empty(0))
    assert ended.wait(10)
    watch.end()
    watch.close()
    warning, error = caplog.records[0], caplog.records[-1]
    assert "rank 2 of 4 has waited" in warning.getMessage()
    assert "other ranks have not called it" in warning.getMessage()
    assert error.levelno == logging.ERROR
    assert "ending the job after" in error.getMessage()


def test_watch_leaves_no_thread() -> None:
    before = threading.active_count()
    watch = Watch("serial", 0, 1)
    watch.begin("barrier", None)
    assert threading.active_count() == before + 1
    watch.end()
    watch.close()
    assert threading.active_count() == before


def _arrivals(counts: list[int], mine: int) -> Arrivals:
    counters = [memoryview(bytearray(8)).cast("q") for _ in counts]
    for counter, count in zip(counters, counts, strict=True):
        counter[0] = count
    return Arrivals(counters, [10 + n for n in range(len(counts))], mine)


def test_arrivals() -> None:
    arrivals = _arrivals([3, 2, 2, 4], mine=1)
    assert arrivals.late() == []
    arrivals.count()
    assert arrivals.late() == [12]


@pytest.mark.parametrize(
    ("counts", "elsewhere", "expected"),
    [
        ([1, 0, 0], False, "rank(s) 11, 12"),
        ([1, 0, 1], True, "rank(s) 11 of this node (and perhaps others)"),
        ([1, 1, 1], True, "all ranks of this node are there, but some on other nodes"),
        ([1, 1, 1], False, "other ranks"),
    ],
)
def test_who_is_late(counts: list[int], elsewhere: bool, expected: str) -> None:
    watch = Watch("mpi", 0, 6)
    watch.arrivals, watch.elsewhere = _arrivals(counts, mine=0), elsewhere
    assert watch._who() == expected
