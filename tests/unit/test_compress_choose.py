"""``compression="auto"``: all ranks choose the same, from what they measured together."""

import logging
import threading
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hpc_dl.arrays import Parameter
from hpc_dl.comm import Communicator, Op
from hpc_dl.compress import Auto, Policy, Scheme, make, policy_of
from hpc_dl.errors import OptionError
from hpc_dl.reduce import choose
from hpc_dl.reduce.build import check_op, make_reducer
from hpc_dl.reduce.choose import Chooser
from hpc_dl.reduce.cost import Work, network_of_link
from hpc_dl.reduce.measure import measure_work
from hpc_dl.testing import run_threads

pytestmark = pytest.mark.timeout(60)

F32 = np.dtype(np.float32)
PARAMETERS = (
    Parameter("a", (512, 512), F32),
    Parameter("b", (1024, 256), np.dtype(np.float16)),
    Parameter("c", (100,), F32),
)
SLOW, FAST = 1e6, 1e15
AUTO = Auto(candidates=("none", "fp16", "topk:ratio=0.01"), steps=4)


class Clock(threading.local):
    """A clock that only the test moves; each rank has its own."""

    now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture(autouse=True)
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(choose, "time", SimpleNamespace(perf_counter=clock))
    return clock


def pretend(
    monkeypatch: pytest.MonkeyPatch, bandwidth: float, rate: Callable[[Scheme], float] | None = None
) -> None:
    """Let such a network be measured, and work that takes no time, or what ``rate`` says."""

    def worked(scheme: Scheme, size: int, *rest: Any) -> Work:
        work = measure_work(scheme, size, 1 << 12)
        return Work(0.0 if rate is None else rate(scheme), work.calls)

    monkeypatch.setattr(
        choose, "measure_network", lambda comm, *_: network_of_link(comm.size, bandwidth, 1e-6)
    )
    monkeypatch.setattr(choose, "measure_work", worked)
    monkeypatch.setattr(choose, "measure_cast", lambda *_: 0.0)


def watched(auto: Auto, clock: Clock, backward: float = 0.0, steps: int = 6) -> Chooser:
    """Take steps of a second."""
    chooser = Chooser(auto)
    for _ in range(steps):
        clock.now += 1.0 - backward
        chooser.gradient()
        clock.now += backward
        chooser.gradient()  # a later one
        chooser.step(clock.now, 0.0)
    return chooser


def chosen_by(size: int, clock: Clock, auto: Auto = AUTO) -> list[str]:
    """Return what each rank chooses."""

    def main(comm: Communicator) -> str:
        return watched(auto, clock).choose(comm, PARAMETERS, 1 << 20).describe()

    return run_threads(size, main)


@pytest.mark.parametrize("size", [2, 3])
@pytest.mark.parametrize(("bandwidth", "expected"), [(SLOW, "topk"), (FAST, "")])
def test_a_slow_network_is_spared_and_a_fast_one_used(
    size: int, bandwidth: float, expected: str, monkeypatch: pytest.MonkeyPatch, clock: Clock
) -> None:
    pretend(monkeypatch, bandwidth)
    found = chosen_by(size, clock)
    assert len(set(found)) == 1
    assert ("topk" in found[0]) == bool(expected)
    if not expected:
        assert found[0] == policy_of("none").describe()


def test_slow_kernels_are_seen_on_any_rank(monkeypatch: pytest.MonkeyPatch, clock: Clock) -> None:
    """All wait for the slowest rank, so its kernels count."""
    slow = threading.local()
    pretend(monkeypatch, SLOW, lambda s: 1e-3 if s.name == "topk" and slow.here else 1e-12)

    def main(comm: Communicator, slow_one: int) -> str:
        slow.here = comm.rank == slow_one
        return watched(AUTO, clock).choose(comm, PARAMETERS, 1 << 20).describe()

    for slow_one, expected in ((-1, True), (0, False), (2, False)):
        found = run_threads(3, lambda comm, i=slow_one: main(comm, i))  # type: ignore[misc]
        assert len(set(found)) == 1
        assert ("topk" in found[0]) == expected


def test_the_choice_is_said_once(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, clock: Clock
) -> None:
    """In the table of ``hpc-dl plan``."""
    pretend(monkeypatch, SLOW)
    with caplog.at_level(logging.INFO, "hpc_dl.compress"):
        chosen_by(3, clock)
    (record,) = caplog.records
    said, titles, *lines = record.getMessage().splitlines()
    assert "1000.00 ms without compression" in said
    assert titles.split()[:3] == ["compression", "MB", "sent"]
    assert "than none" in titles
    assert "than fp16" in titles
    assert [line.split()[0] for line in lines] == list(AUTO.candidates)
    assert [" <- " in line for line in lines] == [False, False, True]


@pytest.mark.parametrize(("backward", "expected"), [(0.9, False), (0.0, True)])
def test_what_backward_hides_need_not_be_compressed(
    backward: float, expected: bool, monkeypatch: pytest.MonkeyPatch, clock: Clock
) -> None:
    """The same network, and gradients that come one by one or all at the end."""
    # Half a second for 64 buckets of 128 KB, so the last one, never hidden, is no matter.
    pretend(monkeypatch, 16e6)
    many = [Parameter(f"p{i}", (32, 1024), F32) for i in range(64)]
    auto = AUTO._replace(candidates=("none", "topk:ratio=0.001"))

    def main(comm: Communicator) -> str:
        return watched(auto, clock, backward).choose(comm, many, 1 << 10).describe()

    assert [("topk" in found) for found in run_threads(2, main)] == [expected, expected]


@pytest.mark.parametrize("steps", [1, 2, 3, 10])
def test_it_chooses_after_any_number_of_steps(steps: int, monkeypatch: pytest.MonkeyPatch) -> None:
    pretend(monkeypatch, SLOW)
    auto = AUTO._replace(steps=steps)

    def main(comm: Communicator) -> Policy:
        chooser = Chooser(auto)
        taken = 0
        while not chooser.due():
            chooser.step(0.0, 0.0)
            taken += 1
        assert taken == steps + 1  # the first has no beginning
        return chooser.choose(comm, PARAMETERS, 1 << 20)

    assert all("topk" in found.describe() for found in run_threads(2, main))


@pytest.mark.parametrize(
    ("auto", "said"),
    [
        (Auto(steps=0), "steps=0"),
        (Auto(candidates=()), "candidates"),
        (Auto(gain=1.0), "gain=1.0"),
        (Auto(gain=-0.1), "gain=-0.1"),
        (Auto(candidates=("none", "tpok")), "tpok"),
        (Auto(candidates=("none", "auto")), "stands alone"),
    ],
)
def test_bad_options_are_said_at_once(auto: Auto, said: str) -> None:
    with pytest.raises(OptionError, match=said):
        policy_of(auto)


def test_a_policy_can_be_looked_up_whatever_the_candidates_are() -> None:
    """As tapes do, which find their buckets again by their options."""
    given = Auto(candidates=["none", {"name": "topk", "ratio": 0.1}, make("onebit")])  # type: ignore[arg-type]
    policy = policy_of(given)
    assert hash(policy) == hash(policy_of(given))
    assert policy.auto is not None
    assert [policy_of(c).describe() for c in policy.auto.candidates] == [
        policy_of(c).describe() for c in ("none", "topk:ratio=0.1", "onebit")
    ]


def test_candidates_are_measured_where_they_are(
    caplog: pytest.LogCaptureFixture, clock: Clock
) -> None:
    """Nothing is replaced but the clock: collectives and kernels run."""
    auto = Auto(candidates=("none", "int8", "powersgd:rank=2", "topk"), steps=2)
    with caplog.at_level(logging.INFO, "hpc_dl.compress"):
        found = chosen_by(2, clock, auto)
    assert len(set(found)) == 1
    assert "predicted" in caplog.text


# --- what was chosen is timed -------------------------------------------------------


def trained(
    size: int,
    clock: Clock,
    seconds: dict[str, float],
    auto: Auto = AUTO,
    slow: Callable[[int, str], float] = lambda rank, name: 0.0,
    waited: float = 0.0,
) -> list[list[str]]:
    """Train until the choice is settled; return what each rank has chosen, one after the other.

    Args:
        seconds: of a step with each compression.
        slow: seconds that a rank needs more.
        waited: seconds of a step in which ranks waited.
    """

    def main(comm: Communicator) -> list[str]:
        chooser, now, found = Chooser(auto), "none", []
        for _ in range(100):
            clock.now += seconds[now] + slow(comm.rank, now)
            chooser.step(clock.now, waited)
            if chooser.due():
                policy = chooser.choose(comm, PARAMETERS, 1 << 20)
                now = policy.rules[0].scheme.name if policy.rules else "none"
                found.append(now)
                if chooser.settled:
                    return found
        raise AssertionError(f"not settled: {found}")

    return run_threads(size, main)


@pytest.mark.parametrize(
    ("seconds", "expected"),
    [
        # As predicted: there it stays.
        ({"none": 1.0, "fp16": 0.6, "topk": 0.1}, ["topk", "topk"]),
        # Slower than the next best is predicted to be, which is as fast as that.
        ({"none": 1.0, "fp16": 0.5, "topk": 0.9}, ["topk", "fp16", "fp16"]),
        # So is that, and the first was the best of all.
        ({"none": 1.0, "fp16": 0.99, "topk": 0.8}, ["topk", "fp16", "topk"]),
        # None is as fast as without.
        ({"none": 1.0, "fp16": 1.2, "topk": 1.5}, ["topk", "fp16", "none"]),
        # It gains, but too little to change gradients for.
        ({"none": 1.0, "fp16": 1.0, "topk": 0.99}, ["topk", "fp16", "none"]),
    ],
)
def test_what_is_slower_than_it_promised_is_left_again(
    seconds: dict[str, float],
    expected: list[str],
    monkeypatch: pytest.MonkeyPatch,
    clock: Clock,
) -> None:
    pretend(monkeypatch, SLOW)
    assert trained(2, clock, seconds) == [expected] * 2


def test_not_to_compress_needs_no_proof(monkeypatch: pytest.MonkeyPatch, clock: Clock) -> None:
    """It was timed in the first steps."""
    pretend(monkeypatch, FAST)
    assert trained(2, clock, {"none": 1.0}) == [["none"]] * 2


@pytest.mark.parametrize(
    ("seconds", "waited", "expected"),
    [
        # Half of what is waited for could be saved, and is; or it is not.
        ({"none": 1.0, "fp16": 0.6, "topk": 0.9}, 0.9, ["topk", "fp16", "fp16"]),
        ({"none": 1.0, "fp16": 0.95, "topk": 0.9}, 0.9, ["topk", "fp16", "topk"]),
        # It could not be as fast as what was chosen, or not by enough.
        ({"none": 1.0, "topk": 0.5}, 0.9, ["topk", "topk"]),
        ({"none": 1.0, "topk": 0.9}, 0.2, ["topk", "topk"]),
    ],
)
def test_what_was_chosen_is_compared_with_a_cast(
    seconds: dict[str, float],
    waited: float,
    expected: list[str],
    monkeypatch: pytest.MonkeyPatch,
    clock: Clock,
) -> None:
    """Also where a cast is predicted to be slow."""
    pretend(monkeypatch, SLOW)
    monkeypatch.setattr(choose, "measure_cast", lambda *_: 1.0)
    assert trained(2, clock, seconds, waited=waited) == [expected] * 2


def test_not_to_compress_is_compared_with_a_cast(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, clock: Clock
) -> None:
    pretend(monkeypatch, FAST)
    with caplog.at_level(logging.INFO, "hpc_dl.compress"):
        found = trained(2, clock, {"none": 1.0, "fp16": 0.6}, waited=0.9)
    assert found == [["fp16", "fp16"]] * 2
    assert caplog.records[0].getMessage().endswith("tried: fp16")


def test_the_slowest_rank_decides_for_all(monkeypatch: pytest.MonkeyPatch, clock: Clock) -> None:
    pretend(monkeypatch, SLOW)

    def slow(rank: int, name: str) -> float:
        return 5.0 if rank == 1 and name == "topk" else 0.0

    seconds = {"none": 1.0, "fp16": 0.5, "topk": 0.1}
    assert trained(3, clock, seconds, slow=slow) == [["topk", "fp16", "fp16"]] * 3


@given(
    st.lists(st.sampled_from([0.05, 0.3, 0.5, 0.9, 0.99, 1.0, 1.4]), min_size=3, max_size=3),
    st.sampled_from([SLOW, 3e8, FAST]),
)
@settings(max_examples=20, deadline=None)
def test_it_ends_and_is_never_much_slower_than_without(
    steps: list[float], bandwidth: float
) -> None:
    with pytest.MonkeyPatch.context() as monkeypatch:
        clock = Clock()
        monkeypatch.setattr(choose, "time", SimpleNamespace(perf_counter=clock))
        pretend(monkeypatch, bandwidth)
        seconds = dict(zip(("none", "fp16", "topk"), steps, strict=True))
        chosen = trained(2, clock, seconds)[0]
    assert len(chosen) <= len(AUTO.candidates) + 1
    last = seconds[chosen[-1]]
    assert last <= seconds["none"] + 1e-9
    # No other that was tried is faster by more than what is asked for.
    assert all(seconds[name] >= last * (1 - AUTO.gain) - 1e-9 for name in chosen)


def test_each_proof_is_said(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, clock: Clock
) -> None:
    pretend(monkeypatch, SLOW)
    with caplog.at_level(logging.INFO, "hpc_dl.compress"):
        trained(2, clock, {"none": 1.0, "fp16": 0.5, "topk": 0.9})
    said = [record.getMessage() for record in caplog.records]
    assert len(said) == 3
    assert "with topk:ratio=0.01 takes 900.00 ms, without compression 1000.00 ms" in said[1]
    assert said[1].endswith("next: fp16")
    assert said[2].endswith("from now on: fp16")


def test_gradients_that_lie_on_a_device_are_measured_there(
    monkeypatch: pytest.MonkeyPatch, clock: Clock
) -> None:
    seen: list[Any] = []
    pretend(monkeypatch, SLOW)
    worked = choose.measure_work

    def noted(scheme: Scheme, size: int, elements: int, device: Any, together: Any) -> Work:
        seen.append(device)
        return worked(scheme, size, elements, device, together)

    monkeypatch.setattr(choose, "measure_work", noted)
    device = torch.device("cpu")

    def main(comm: Communicator) -> None:
        watched(AUTO, clock).choose(comm, PARAMETERS, 1 << 20, device)

    run_threads(2, main)
    assert seen == [device] * 2


# --- reducers -----------------------------------------------------------------------


@pytest.mark.parametrize("op", [Op.MAX, Op.MIN, Op.PRODUCT])
def test_only_means_and_sums_are_compressed(op: Op) -> None:
    with pytest.raises(OptionError, match="Average or Sum"):
        check_op(op)

    def main(comm: Communicator) -> None:
        make_reducer(comm, PARAMETERS, op, 1 << 20)
        with pytest.raises(OptionError, match=f"op={op.value}"):
            make_reducer(comm, PARAMETERS, op, 1 << 20, policy=policy_of("onebit"))

    run_threads(1, main)


def test_each_bucket_is_compressed_or_not() -> None:
    """Large matrices are, in buckets of float32; what is small keeps its type."""

    def main(comm: Communicator) -> None:
        reducer = make_reducer(comm, PARAMETERS, Op.AVERAGE, 1 << 19, policy=policy_of("onebit"))
        found = {
            tuple(p.name for p in bucket.parameters): (
                bucket.dtype,
                reducer.compression is not None and reducer.compression.covers(number),
            )
            for number, bucket in enumerate(reducer.layout.buckets)
        }
        assert found == {("a",): (F32, True), ("b",): (F32, True), ("c",): (F32, False)}

    run_threads(2, main)


def test_dense_bytes_are_those_of_the_gradients_own_types() -> None:
    def main(comm: Communicator) -> tuple[int, int, int]:
        reducer = make_reducer(comm, PARAMETERS, Op.AVERAGE, 1 << 20, policy=policy_of("onebit"))
        for view in reducer.views().values():
            view[:] = comm.rank + 1
        for bucket, parts in enumerate(reducer.layout.buckets):
            for _ in parts.parameters:
                reducer.ready(bucket)
        reducer.finish()
        done = reducer.traffic()
        return done.bytes_sent, done.bytes_dense, reducer.layout.buckets[-1].nbytes

    own = sum(p.nbytes for p in PARAMETERS)
    # Of 512 x 512 and 1024 x 256 values, a bit each and a float32 for 1024.
    blocks = (512 * 512 + 1024 * 256) // 1024
    for sent, dense, plain in run_threads(2, main):
        assert 400 <= plain <= 512  # padded
        assert dense == own
        assert sent == blocks * (128 + 4) + plain
