"""Compressors that send some entries: random ones, those above a threshold, DGC and DeMo."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hpc_dl.comm import Communicator
from hpc_dl.compress import (
    AllReduced,
    Floats,
    Segment,
    Step,
    Unit,
    make,
    momentum_correction,
)
from hpc_dl.compress.demo import Demo, cosines
from hpc_dl.compress.dgc import Dgc
from hpc_dl.compress.kernels.demo import CHUNK, pick
from hpc_dl.compress.randomk import RandomK, draw
from hpc_dl.compress.threshold import Threshold
from hpc_dl.errors import OptionError
from hpc_dl.reduce.exchange import make_exchange
from hpc_dl.testing import run_threads

pytestmark = pytest.mark.timeout(120)


def _normal(size: int, *seed: int) -> Floats:
    return np.random.default_rng(seed).standard_normal(size, np.float32)


def _average(
    compressor: AllReduced, xs: list[Floats], feedback: bool = True, step: int = 0, seed: int = 0
) -> tuple[list[Floats], list[Floats | None], int]:
    """Run all ranks in lockstep; return what comes out, what is left, and bytes of one rank."""
    unit = Unit.single("w", (len(xs[0]),))
    outs = [np.full_like(x, 7) for x in xs]
    lefts = [np.full_like(x, 7) if feedback else None for x in xs]
    ranks = [
        compressor.rounds(x, out, left, {}, unit, Step(step, rank, len(xs), seed))
        for rank, (x, out, left) in enumerate(zip(xs, outs, lefts, strict=True))
    ]
    sent = 0
    for rounds in zip(*ranks, strict=True):
        mean = np.mean([item.buffer for item in rounds], axis=0)
        sent += rounds[0].buffer.nbytes
        for item in rounds:
            item.buffer[:] = mean
    return outs, lefts, sent


# --- random entries -----------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(
    size=st.integers(1, 5000),
    ratio=st.sampled_from([1e-4, 0.01, 0.3, 0.5, 1.0]),
    ranks=st.integers(1, 4),
    seed=st.integers(0, 2**31),
)
def test_random_entries_are_averaged_and_the_others_left(
    size: int, ratio: float, ranks: int, seed: int
) -> None:
    compressor = RandomK(ratio)
    xs = [_normal(size, rank) + np.float32(10) for rank in range(ranks)]
    outs, lefts, sent = _average(compressor, xs, seed=seed)
    mean = np.mean(xs, axis=0)
    chosen = outs[0] != 0
    for x, out, left in zip(xs, outs, lefts, strict=True):
        np.testing.assert_array_equal(out, outs[0])
        np.testing.assert_array_equal(left, np.where(chosen, 0, x))
    np.testing.assert_allclose(outs[0], np.where(chosen, mean, 0), rtol=1e-5)
    assert sent == compressor.payload_bytes(Unit.single("w", (size,)), ranks)
    # As many as wanted, but for whole runs.
    wanted = max(1, round(ratio * size))
    assert abs(chosen.sum() - wanted) <= max(1, wanted / 8)
    if ratio == 1:
        assert chosen.all()


@settings(max_examples=100, deadline=None)
@given(total=st.integers(1, 2000), part=st.floats(0, 1), key=st.integers(0, 2**32 - 1))
def test_drawn_numbers_are_sorted_and_none_twice(total: int, part: float, key: int) -> None:
    count = max(1, round(total * part))
    drawn = draw(key, count, total)
    assert len(drawn) == count
    assert (np.diff(drawn) > 0).all()
    assert 0 <= drawn[0] <= drawn[-1] < total


def test_each_number_is_as_likely_as_any_other() -> None:
    total, count, times = 23, 5, 20_000
    drawn = np.concatenate(
        [draw(key * 2_654_435_761 % 2**32, count, total) for key in range(times)]
    )
    share = np.bincount(drawn, minlength=total) / times
    bound = 6 * math.sqrt(count / total / times)
    np.testing.assert_allclose(share, count / total, atol=bound)


def test_scaled_random_entries_are_unbiased() -> None:
    size, times = 700, 3000
    compressor, x = RandomK(0.2, scale=True), _normal(size, 0)
    total = np.zeros(size)
    for step in range(times):
        total += _average(compressor, [x], feedback=False, step=step)[0][0]
    # Each entry is 1/p times itself with probability p.
    bound = 6 * np.abs(x) * math.sqrt((1 / 0.2 - 1) / times) + 1e-6
    assert (np.abs(total / times - x) <= bound).all()


def test_random_entries_are_not_scaled_where_error_feedback_makes_up() -> None:
    x = _normal(500, 0)
    scaled, plain = (_average(RandomK(0.1, scale), [x])[0][0] for scale in (True, False))
    np.testing.assert_array_equal(scaled, plain)


def test_steps_seeds_and_parameters_draw_differently() -> None:
    x, compressor = np.ones(1000, np.float32), RandomK(0.1)
    drawn = [
        _average(compressor, [x], step=step, seed=seed)[0][0].tobytes()
        for step, seed in ((0, 0), (0, 0), (1, 0), (0, 1))
    ]
    assert drawn[0] == drawn[1]
    assert len(set(drawn)) == 3


# --- threshold ----------------------------------------------------------------------


@settings(max_examples=40, deadline=None)
@given(
    size=st.integers(1, 5000), value=st.floats(0.01, 4), feedback=st.booleans(), seed=st.integers(0)
)
def test_entries_of_at_least_the_threshold_are_sent(
    size: int, value: float, feedback: bool, seed: int
) -> None:
    compressor, unit = Threshold(value), Unit.single("w", (size,))
    x, before = _normal(size, seed), _normal(size, seed, 1)
    if feedback:
        left = before.copy()
        whole = before + x
        chosen = compressor.select_with_residual(x, left, {}, unit, Step(0))
    else:
        whole = x
        chosen = compressor.select(x, {}, unit, Step(0))
    wanted = np.abs(whole) >= np.float32(value)
    np.testing.assert_array_equal(chosen.indices, np.flatnonzero(wanted))
    np.testing.assert_array_equal(chosen.values, whole[wanted])
    if feedback:
        np.testing.assert_array_equal(left, np.where(wanted, 0, whole))


def test_ranks_of_different_counts_exchange_by_threshold() -> None:
    size = 3000

    def main(comm: Communicator) -> tuple[Floats, Floats]:
        exchange = make_exchange(comm, Unit.single("w", (size,)), make("threshold:value=2.0"))
        bucket = _normal(size, comm.rank) * np.float32(comm.rank)  # the first has nothing
        exchange.run(bucket, 0)
        return bucket, exchange.arrays()["residual"]

    found = run_threads(3, main)
    mean = np.mean([_normal(size, rank) * rank for rank in range(3)], axis=0)
    rest = np.mean([left for _, left in found], axis=0)
    np.testing.assert_allclose(found[0][0] + rest, mean, atol=1e-5)
    assert found[0][0].any()


# --- deep gradient compression ------------------------------------------------------


def test_the_ramp_sends_a_quarter_less_in_each_stage() -> None:
    unit, compressor = Unit.single("w", (100_000,)), Dgc(0.001, ramp=8)
    found = [compressor.density(unit, Step(number)) for number in range(10)]
    stages = [0.25, 0.25, 0.0625, 0.0625, 0.015625, 0.015625, 0.00390625, 0.00390625]
    np.testing.assert_allclose(found, [*stages, 0.001, 0.001], atol=1e-5)
    for number in (0, 3, 9):
        chosen = compressor.select(_normal(unit.size, 0), {}, unit, Step(number))
        assert 0.6 < len(chosen.indices) / (unit.size * found[number]) <= 1.25 + 1e-9
    # A ratio above a stage's is kept.
    assert Dgc(0.1, ramp=8).density(unit, Step(7)) == pytest.approx(0.1)


def test_momentum_is_taken_before_selection_and_forgotten_where_sent() -> None:
    unit = Unit.single("w", (8,))

    def main(comm: Communicator) -> None:
        exchange = make_exchange(comm, unit, make("dgc:ratio=0.125,momentum=0.5"))
        velocity, waiting = np.zeros(8), np.zeros(8)
        for step in range(6):
            bucket = _normal(8, step)
            velocity = 0.5 * velocity + bucket
            waiting += velocity
            place = np.argmax(np.abs(waiting))
            expected = np.zeros(8)
            expected[place] = waiting[place]
            waiting[place] = velocity[place] = 0
            exchange.run(bucket, step)
            np.testing.assert_allclose(bucket, expected, atol=1e-6)

    run_threads(1, main)


def test_the_momentum_option_is_the_compressors_own() -> None:
    scheme = make("dgc:momentum=0.5")
    assert scheme.momentum == 0.5
    assert scheme.compressor == Dgc(momentum=0.5)
    assert make("dgc").momentum == 0.9
    assert make("topk:momentum=0.5").momentum == 0.5


@pytest.mark.parametrize("scale", [1e-30, 1.0, 1e30])
def test_clipping_limits_the_norm(scale: float) -> None:
    x = _normal(1000, 0) * np.float32(scale)
    norm = float(np.linalg.norm(x.astype(np.float64)))
    clipped, kept = x.copy(), x.copy()
    Dgc(clip=norm / 2).prepare(clipped, 4)
    np.testing.assert_allclose(clipped, x / 4, rtol=1e-5)
    Dgc(clip=norm * 2.1).prepare(kept, 4)
    np.testing.assert_array_equal(kept, x)


@pytest.mark.parametrize("warmup", [0, 1])
def test_gradients_are_clipped_before_momentum_in_each_phase(warmup: int) -> None:
    unit = Unit.single("w", (4,))

    def main(comm: Communicator) -> None:
        scheme = make(f"dgc:ratio=1.0,momentum=0.5,clip=1,warmup={warmup}")
        exchange = make_exchange(comm, unit, scheme)
        bucket = np.array([30, 0, 0, 40], np.float32)
        exchange.run(bucket, 0)
        np.testing.assert_allclose(bucket, [0.6, 0, 0, 0.8], rtol=1e-6)

    run_threads(1, main)


# --- DeMo ---------------------------------------------------------------------------

#: Tails of several lengths, a gap, and a parameter shorter than a chunk.
UNIT = Unit((Segment("a", (10, 13), 0), Segment("b", (5,), 136), Segment("c", (128,), 144)), 272)


def test_the_basis_is_orthonormal_and_of_cosines() -> None:
    waves = cosines()
    np.testing.assert_allclose(waves @ waves.T, np.eye(CHUNK), atol=1e-5)
    np.testing.assert_allclose(waves[0], 1 / 8, rtol=1e-6)
    n = np.arange(CHUNK)
    np.testing.assert_allclose(
        waves[3] / waves[3, 0] * np.cos(3 * np.pi / 128),
        np.cos((2 * n + 1) * 3 * np.pi / 128),
        atol=1e-5,
    )


@settings(max_examples=60, deadline=None)
@given(
    chunks=st.integers(1, 5),
    count=st.integers(1, CHUNK),
    keep=st.booleans(),
    seed=st.integers(0, 2**32),
    sparse=st.booleans(),
    scale=st.sampled_from([0.0, 1e-42, 1.0, 1e37]),
)
def test_picked_coefficients_have_the_same_bytes(
    chunks: int, count: int, keep: bool, seed: int, sparse: bool, scale: float
) -> None:
    x = _normal(chunks * CHUNK, seed) * np.float32(scale)
    if sparse:
        x[_normal(len(x), seed, 1) < 1] *= np.float32(-0.0)
    found = []
    for function in (pick, pick.reference):
        left, indices = x.copy(), np.zeros(chunks * count, np.int32)
        values = np.zeros(chunks * count, np.float32)
        number = function(x, cosines(), count, left, keep, indices, values)
        assert (np.diff(indices[:number]) > 0).all()
        assert (values[:number] != 0).all()
        found.append((number, left.tobytes(), indices.tobytes(), values.tobytes()))
    assert found[0] == found[1]


def test_what_is_sent_are_the_largest_coefficients_of_the_momentum() -> None:
    compressor = Demo(k=3, decay=0.5)
    x, left = _normal(UNIT.size, 0), _normal(UNIT.size, 1)
    for array in (x, left):
        array[130:136] = array[141:144] = 0
    momentum = 0.5 * left + x
    chosen = compressor.select_with_residual(x, left, {}, UNIT, Step(0))
    coefficients = momentum.copy()
    for start in (0, 64, 144, 208):
        coefficients[start : start + CHUNK] = cosines() @ momentum[start : start + CHUNK]
    wanted: list[int] = []
    for start, stop in ((0, 64), (64, 128), (128, 130), (136, 141), (144, 208), (208, 272)):
        order = np.argsort(-np.abs(coefficients[start:stop]))[:3]
        wanted += sorted(start + order)
    np.testing.assert_array_equal(chosen.indices, wanted)
    np.testing.assert_allclose(chosen.values, coefficients[wanted], atol=1e-5)
    assert 8 * len(wanted) == compressor.payload_bytes(UNIT, 1)
    # What is left and what is sent are the momentum.
    total, sent = np.zeros(UNIT.size, np.float32), np.empty(UNIT.size, np.float32)
    total[chosen.indices] = chosen.values
    compressor.restore(total, sent, UNIT)
    np.testing.assert_allclose(left + sent, momentum, atol=1e-5)


def test_zeros_are_not_sent() -> None:
    left = np.zeros(UNIT.size, np.float32)
    chosen = Demo().select_with_residual(left.copy(), left, {}, UNIT, Step(0))
    assert len(chosen.indices) == 0
    assert not left.any()


def test_all_coefficients_are_the_average_itself() -> None:
    unit = Unit.single("w", (200,))

    def main(comm: Communicator) -> None:
        exchange = make_exchange(comm, unit, make(f"demo:k={CHUNK},decay=1"))
        bucket = _normal(200, comm.rank)
        exchange.run(bucket, 0)
        mean = np.mean([_normal(200, rank) for rank in range(comm.size)], axis=0)
        np.testing.assert_allclose(bucket, mean, atol=1e-5)

    run_threads(3, main)


def test_momentum_correction_refuses_demo() -> None:
    with pytest.raises(OptionError, match="momentum of its own"):
        momentum_correction(Demo())


# --- in the engine ------------------------------------------------------------------


@pytest.mark.parametrize(
    "spec",
    ["randomk:ratio=0.0", "threshold:value=0.0", "threshold:value=-1", "dgc:ratio=2.0",
     "dgc:momentum=1.0", "dgc:ramp=-1", "dgc:clip=-1", "demo:k=0", "demo:k=65", "demo:decay=2.0"],
)  # fmt: skip
def test_bad_options_are_named(spec: str) -> None:
    option = spec.partition(":")[2].partition("=")[0]
    with pytest.raises(OptionError, match=f"{option}=.*give"):
        make(spec)
