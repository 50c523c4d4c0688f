"""The guard of compression: all ranks suspend it together, lose nothing, and try again."""

import logging
import math
from collections.abc import Generator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import pytest

from hpc_dl.arrays import Parameter, plan
from hpc_dl.comm import Communicator, Op
from hpc_dl.compress import (
    Bytes,
    Codec,
    Floats,
    Limits,
    Round,
    Scheme,
    Sparse,
    Sparsifier,
    State,
    Step,
    Unit,
    make,
)
from hpc_dl.compress.casts import Float16
from hpc_dl.reduce.compression import BucketCompression
from hpc_dl.reduce.exchange import Health, make_exchange
from hpc_dl.reduce.quality import Quality
from hpc_dl.testing import run_threads
from hpc_dl.testing.same import assert_same_bytes

pytestmark = pytest.mark.timeout(60)

LENGTH = 1600
SHAPE = (40, 40)
FINE = Health(gradient=1, whole=1, product=0.9, sent=0.9, left=0.1, not_finite=0)
BAD_DIRECTION = FINE._replace(product=-0.5)
LARGE_RESIDUAL = FINE._replace(left=1e9)
NOT_FINITE = Health(0, 0, 0, 0, 0, 1)


def judged(
    size: int, limits: Limits, healths: dict[int, dict[int, Health]], steps: int
) -> list[tuple[list[bool], list[str]]]:
    """Return for each rank in which steps it was suspended, and why.

    Args:
        healths: by step and rank, where not ``FINE``.
    """

    def main(comm: Communicator) -> tuple[list[bool], list[str]]:
        quality, suspended = Quality(comm, limits), []
        for step in range(steps):
            suspended.append(quality.suspended(step))
            if quality.looks(step) and not suspended[-1]:
                quality.add(healths.get(step, {}).get(comm.rank, FINE))
            quality.judge(step)
        return suspended, quality.reasons

    return run_threads(size, main)


@pytest.mark.parametrize("size", [1, 2, 3])
@pytest.mark.parametrize(
    ("bad", "said"), [(BAD_DIRECTION, "cosine"), (LARGE_RESIDUAL, "what is left")]
)
def test_all_ranks_suspend_in_the_same_step(size: int, bad: Health, said: str) -> None:
    limits = Limits(every=2, pause=3, tries=9, min_cosine=0.5)
    everyone = judged(size, limits, {3: {size - 1: bad._replace(product=-2 * size)}}, 12)
    if said == "what is left":
        everyone = judged(size, limits, {3: {size - 1: bad}}, 12)
    for suspended, reasons in everyone:
        assert [i for i, s in enumerate(suspended) if s] == [4, 5, 6]
        assert len(reasons) == 1
        assert said in reasons[0]


def test_after_so_many_tries_it_stays() -> None:
    limits = Limits(every=1, pause=2, tries=3)
    bad = {step: {0: BAD_DIRECTION, 1: BAD_DIRECTION} for step in range(100)}
    for suspended, reasons in judged(2, limits, bad, 30):
        running = [i for i, s in enumerate(suspended) if not s]
        assert running == [0, 3, 6]
        assert len(reasons) == 3


@pytest.mark.parametrize("every", [0, 7])
def test_looks(every: int) -> None:
    quality = Quality(run_threads(1, lambda comm: comm)[0], Limits(every=every))
    looked = [step for step in range(30) if quality.looks(step)]
    assert looked == ([6, 13, 20, 27] if every else [])


def test_a_step_that_is_not_finite_is_no_matter_of_compression() -> None:
    limits = Limits(every=1, pause=2)
    for suspended, _ in judged(2, limits, {1: {0: NOT_FINITE, 1: BAD_DIRECTION}}, 4):
        assert not any(suspended)


@pytest.mark.parametrize("value", [math.inf, math.nan])
def test_figures_that_overflow_do_not_stop_training(value: float) -> None:
    strange = Health(value, value, value, value, value, 0)
    judged(2, Limits(every=1), {0: {0: strange}, 1: {0: strange, 1: strange}}, 3)


def test_one_warning_from_one_rank(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        judged(3, Limits(every=1, pause=5, tries=2), {0: dict.fromkeys(range(3), BAD_DIRECTION)}, 3)
    (record,) = caplog.records
    assert "step 0: compression is suspended for 5 steps" in record.getMessage()


def losses(reported: Sequence[Sequence[float | None]], limits: Limits) -> list[list[bool]]:
    """Return for each rank when it was suspended.

    Args:
        reported: losses by rank and step; None for none.
    """

    def main(comm: Communicator) -> list[bool]:
        quality, suspended = Quality(comm, limits), []
        for step, loss in enumerate(reported[comm.rank]):
            if loss is not None:
                quality.loss = loss
            suspended.append(quality.suspended(step))
            if not suspended[-1]:
                quality.add(FINE)
            quality.judge(step)
        return suspended

    return run_threads(len(reported), main)


def test_a_jump_of_the_loss_suspends() -> None:
    limits = Limits(every=1, pause=1)
    falling, jump = [1.0, 0.9, 0.8, 0.8, 0.8, 0.8], [1.0, 0.9, 9.0, 0.8, 0.8, 0.8]
    for suspended in losses([falling, jump], limits):
        assert [i for i, s in enumerate(suspended) if s] == [3]


def test_losses_that_fall_or_are_not_reported_do_not() -> None:
    nothing = [None] * 5
    for reported in (
        [nothing, nothing],
        [nothing, [5.0, 4.0, 3.0, 2.0, 1.0]],
        [[-1.0, -9, -1] * 2],
    ):
        for suspended in losses(reported, Limits(every=1)):
            assert not any(suspended)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("before", [[], [1.0, 1.0]])
def test_a_reported_loss_that_is_not_finite_suspends(bad: float, before: list[float]) -> None:
    """On one rank, or on all; also if it is the first one."""
    limits, seen = Limits(every=1, pause=2), len(before)
    mine, other = [*before, bad, 1.0, 1.0, 1.0, 1.0], [*before, 1.0, 1.0, 1.0, 1.0, 1.0]
    for reported in ([mine, other], [other, mine], [mine, mine], [mine, [-x for x in mine]]):
        for suspended in losses(reported, limits):
            assert [i for i, s in enumerate(suspended) if s] == [seen + 1, seen + 2]


def test_a_loss_that_is_not_finite_is_no_part_of_the_average() -> None:
    assert (
        reasons_of("onebit:warmup=2", [1.0, math.inf, 1.0, 9.0])
        == [["the loss is 9, and was 1"]] * 2
    )


@pytest.mark.parametrize("bad", [9.0, math.nan])
def test_a_reported_loss_counts_once(bad: float) -> None:
    """Where losses are reported less often than the guard looks, none is news at each look."""

    def main(comm: Communicator) -> list[str]:
        quality = Quality(comm, Limits(every=1, pause=1, tries=3))
        for step in range(12):
            if step in (0, 2):
                quality.loss = bad if step else 1.0
            if not quality.suspended(step):
                quality.add(FINE)
            quality.judge(step)
        return quality.reasons

    assert [len(reasons) for reasons in run_threads(2, main)] == [1, 1]


# --- with gradients ---------------------------------------------------------------------


def gradient(rank: int, step: int) -> Floats:
    return np.random.default_rng([rank, step]).standard_normal(LENGTH, np.float32)


class Case:
    """A compressor of which the guard thinks badly in step 2, which is followed by a pause."""

    limits: ClassVar[Limits] = Limits(every=3, min_cosine=1.0, pause=4, tries=2)
    compressed: ClassVar[list[int]] = [0, 1, 2, 7, 8]
    steps: ClassVar[int] = 20


def trained(
    scheme: Scheme, size: int, op: Op = Op.AVERAGE, gradients: Any = gradient, limits: Any = None
) -> list[tuple[list[Floats], list[int], list[dict[str, Any]]]]:
    """Return for each rank the averages, bytes sent, and states."""
    layout = plan([Parameter("w", SHAPE, np.dtype(np.float32))], 1 << 30)

    def main(comm: Communicator) -> tuple[list[Floats], list[int], list[dict[str, Any]]]:
        compression = BucketCompression(comm, layout, [scheme], op, 1.0, limits or Case.limits)
        outs, sent, states = [], [], []
        for step in range(Case.steps):
            bucket = gradients(comm.rank, step).copy()
            sent.append(compression.run(0, bucket))
            outs.append(bucket)
            states.append(compression.state_dict()["w"])
        return outs, sent, states

    return run_threads(size, main)


@pytest.mark.parametrize("size", [2, 3])
@pytest.mark.parametrize("spec", ["onebit", "topk:ratio=0.1", "topk:ratio=0.4", "powersgd:rank=1"])
def test_suspended_flushed_and_resumed(spec: str, size: int) -> None:
    everyone = trained(make(spec), size)
    bfloat16 = 2 * (size - 1) * 2 * LENGTH // size
    outs, sent, states = everyone[0]
    assert [i for i, n in enumerate(sent) if n != bfloat16] == Case.compressed
    for other, *_ in everyone[1:]:
        assert_same_bytes(other, outs)
    for _, _, states in everyone:
        for step, state in enumerate(states):
            owed = any(state[key].any() for key in ("residual", "server") if key in state)
            assert owed == (step in Case.compressed)
    # The first dense step pays all that is owed, the next ones only their own gradients.
    for step in range(Case.steps):
        if step in Case.compressed:
            continue
        mean = np.mean([gradient(r, step).astype(np.float64) for r in range(size)], axis=0)
        if step - 1 in Case.compressed:
            last = [states[step - 1] for _, _, states in everyone]
            mean += np.mean([s["residual"] for s in last], axis=0)
            mean += sum(s.get("server", 0) for s in last)
        error = np.linalg.norm(outs[step] - mean)
        assert error <= 2.0**-7 * np.linalg.norm(mean)


def test_nothing_is_lost_over_all() -> None:
    size = 3
    everyone = trained(make("onebit"), size, Op.SUM)
    given = sum(gradient(r, s).astype(np.float64) for r in range(size) for s in range(Case.steps))
    came = np.sum(everyone[0][0], axis=0, dtype=np.float64)
    # What bfloat16 rounds is lost, of numbers up to some 30, in 15 steps.
    assert np.linalg.norm(came - given) <= 0.02 * np.linalg.norm(given)


@pytest.mark.parametrize("size", [2, 3])  # alone, a rank sends itself all of its gradient
@pytest.mark.parametrize("spec", ["onebit", "topk:ratio=0.4", "powersgd:rank=1"])
def test_what_is_owed_is_not_paid_into_a_step_that_fails(spec: str, size: int) -> None:
    """NaN in the step of the flush: the optimizer skips it, and the next one pays."""

    def gradients(rank: int, step: int) -> Floats:
        x = gradient(rank, step)
        if step == 3 and rank == size - 1:
            x[5] = np.nan
        return x

    everyone = trained(make(spec), size, gradients=gradients)
    for outs, _, states in everyone:
        assert not np.isfinite(outs[3]).all()
        assert np.isfinite(outs[4]).all()
        for key in ("residual", "server"):
            if key in states[2]:
                assert_same_bytes(states[2][key], states[3][key])
                assert not states[4][key].any()


def test_a_sane_compressor_is_left_alone() -> None:
    limits = Limits(every=1, pause=4, tries=2)
    for spec in ("onebit", "topk:ratio=0.05", "int4", "qsgd", "randomk:ratio=0.1"):
        for _, sent, _ in trained(make(spec), 2, limits=limits):
            assert max(sent) < 2 * LENGTH


def test_health_of_numbers_whose_squares_overflow() -> None:
    def main(comm: Communicator) -> None:
        exchange = make_exchange(comm, Unit.single("w", SHAPE), make("onebit"))
        exchange.run(np.full(LENGTH, 1e25, np.float32), 0, watch=True)
        assert exchange.health is not None
        assert exchange.health.gradient == math.inf
        quality = Quality(comm, Limits(every=1))
        quality.add(exchange.health)
        quality.judge(0)
        assert not quality.suspended(1)

    run_threads(2, main)


@dataclass(frozen=True)
class Turned(Codec):
    """Sends the opposite, or noise."""

    factor: float = -1.0

    name: ClassVar[str] = "turned"
    summary: ClassVar[str] = "the opposite"

    def payload_bytes(self, unit: Unit, size: int) -> float:
        return 4 * unit.size

    def encode(self, x: Floats, key: int) -> Bytes:
        return (x * np.float32(self.factor)).view(np.uint8)

    def decode(self, payload: Bytes, out: Floats) -> None:
        out[:] = payload.view(np.float32)


@dataclass(frozen=True)
class TurnedEntries(Sparsifier):
    """Sends the opposite of the first entries."""

    name: ClassVar[str] = "turned-entries"
    summary: ClassVar[str] = "the opposite of the first entries"

    def payload_bytes(self, unit: Unit, size: int) -> float:
        return unit.size

    def select(self, x: Floats, state: State, unit: Unit, step: Step) -> Sparse:
        count = len(x) // 8
        return Sparse(np.arange(count, dtype=np.int32), -x[:count])


@dataclass(frozen=True)
class TurnedRounds(Float16):
    """Averages the opposite."""

    def rounds(
        self, x: Floats, out: Floats, left: Floats | None, state: State, unit: Unit, step: Step
    ) -> Generator[Round, None, None]:
        yield from super().rounds(-x, out, left, state, unit, step)


def cosine(scheme: Scheme, size: int, shape: tuple[int, ...] = SHAPE) -> float:
    """Return that of what all ranks have, and what they send of it."""
    unit = Unit.single("w", shape)

    def main(comm: Communicator) -> tuple[Health, list[Floats]]:
        outs = []
        for watch in (True, False):
            exchange = make_exchange(comm, unit, scheme)
            bucket = gradient(comm.rank, 0)
            exchange.run(bucket, 0, watch)
            outs.append(bucket)
            if watch:
                assert exchange.health is not None
                health = exchange.health
        return health, outs

    found = run_threads(size, main)
    for _, (watched, other) in found:
        assert_same_bytes(watched, other, "what is looked at")
    together = Health(*np.sum([health for health, _ in found], axis=0).tolist())
    return together.product / math.sqrt(together.whole * together.sent)


@pytest.mark.parametrize("size", [2, 3])
@pytest.mark.parametrize(
    ("scheme", "least", "most"),
    [
        (Scheme(Turned()), -1, -1),
        (Scheme(TurnedEntries()), -0.5, -0.2),
        (Scheme(TurnedRounds()), -1, -1),
        (make("int8"), 0.9998, 0.99999),
        (make("fp8"), 0.999, 0.9999),
        (make("natural"), 0.9, 0.99),
        (make("int4:error_feedback=off"), 0.98, 0.998),
        (make("qsgd"), 0.9, 0.99),
        (make("signsgd"), 0.75, 0.82),  # sqrt(2 / pi) of what is normally distributed
        (make("terngrad"), 0.4, 0.9),
        (make("randomk:ratio=0.25,scale=true"), 0.4, 0.6),
        (make("topk:ratio=0.1,error_feedback=off"), 0.5, 0.8),
        (make("powersgd:rank=2,error_feedback=off"), 0.2, 0.6),
    ],
    ids=lambda value: value.describe() if isinstance(value, Scheme) else None,
)
def test_what_is_sent_is_seen_without_error_feedback(
    scheme: Scheme, least: float, most: float, size: int
) -> None:
    """And looking at it changes nothing."""
    assert least - 1e-6 <= cosine(scheme, size) <= most + 1e-6


def test_compression_that_turns_gradients_is_suspended_without_error_feedback() -> None:
    for scheme in (Scheme(Turned()), Scheme(TurnedRounds())):
        for outs, _, _ in trained(scheme, 2, limits=Limits(every=3, pause=4, tries=2)):
            means = [(gradient(0, step) + gradient(1, step)) / 2 for step in range(len(outs))]
            right = [np.allclose(a, b, atol=0.05) for a, b in zip(outs, means, strict=True)]
            assert [i for i, is_right in enumerate(right) if not is_right] == [0, 1, 2, 7, 8]


def reasons_of(spec: str, losses: list[float]) -> list[list[str]]:
    """Return why each rank's compression was suspended; each loss is reported before a step."""
    layout = plan([Parameter("w", SHAPE, np.dtype(np.float32))], 1 << 30)

    def main(comm: Communicator) -> list[str]:
        limits = Limits(every=1, max_loss=2.0)
        compression = BucketCompression(comm, layout, [make(spec)], limits=limits)
        for step, loss in enumerate(losses):
            compression.report_loss(loss)
            compression.run(0, gradient(comm.rank, step))
        return compression.quality.reasons

    return run_threads(2, main)


@pytest.mark.parametrize("spec", ["onebit", "onebit:warmup=1"])
def test_losses_before_anything_is_compressed_count(spec: str) -> None:
    assert reasons_of(spec, [1.0, 9.0]) == [["the loss is 9, and was 1"]] * 2


def test_a_jump_of_the_loss_in_the_warmup_is_no_matter_of_compression() -> None:
    assert reasons_of("onebit:warmup=3", [1.0, 9.0, 1.0, 1.0]) == [[], []]
    assert reasons_of("onebit:warmup=3", [1.0, 9.0, 1.0, 9.0]) != [[], []]
