"""TernGrad: ranks agree on scales, lanes do not carry, and means are right."""

import itertools
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hpc_dl.compress import AllReduced, Array, Floats, Reduction, Segment, Step, Unit, make
from hpc_dl.compress.kernels import ternary
from hpc_dl.compress.terngrad import lane_bits
from hpc_dl.errors import OptionError
from hpc_dl.testing.same import assert_same_bytes

KERNELS = [ternary.look, ternary.encode, ternary.decode]
SIZES = [1, 2, 4, 7, 8, 127, 128]
#: Parameters of odd lengths, one of one value, and gaps between them.
UNIT = Unit((Segment("a", (5, 3), 0), Segment("b", (1,), 16), Segment("c", (7, 301), 24)), 2140)
_COMBINE = {"max": np.maximum.reduce, "sum": np.add.reduce}


def _terngrad(spec: str = "terngrad") -> AllReduced:
    compressor = make(spec).compressor
    assert isinstance(compressor, AllReduced)
    return compressor


def _together(
    xs: list[Floats], lefts: list[Floats] | None, unit: Unit, number: int = 0, clip: float = 0
) -> tuple[list[Floats], list[list[Array]]]:
    """Run all ranks in lockstep; return what comes out, and what the first rank sent."""
    size, compressor = len(xs), _terngrad(f"terngrad:clip={clip}")
    outs = [np.full_like(x, 7) for x in xs]
    ranks = [
        compressor.rounds(
            x,
            outs[rank],
            None if lefts is None else lefts[rank],
            {},
            unit,
            Step(number, rank, size),
        )
        for rank, x in enumerate(xs)
    ]
    sent = []
    for rounds in zip(*ranks, strict=True):
        sent.append([item.buffer.copy() for item in rounds])
        combined = _COMBINE[rounds[0].op](sent[-1], axis=0, dtype=rounds[0].buffer.dtype)
        for item in rounds:
            item.buffer[:] = combined
    return outs, sent


def _gradients(size: int, unit: Unit, seed: int, scale: float = 1.0) -> list[Floats]:
    result = []
    for rank in range(size):
        rng, x = np.random.default_rng((seed, rank)), np.zeros(unit.size, np.float32)
        for segment in unit.segments:
            segment.of(x)[...] = rng.standard_normal(segment.shape) * scale
        result.append(x)
    return result


@contextmanager
def _in_numpy() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        for kernel in KERNELS:
            patch.setitem(vars(kernel), "fastest", kernel.reference)
        yield


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("scale", [1.0, 1e-39, 1e37, 0.0])
@pytest.mark.parametrize("clip", [0.0, 2.5])
def test_compiled_code_gives_the_bytes_of_numpy(size: int, scale: float, clip: float) -> None:
    pytest.importorskip("numba")
    results = []
    xs = _gradients(size, UNIT, 3, scale)
    for numpy in (False, True):
        lefts = [np.zeros_like(x) for x in xs]
        if numpy:
            with _in_numpy():
                outs, sent = _together(xs, lefts, UNIT, clip=clip)
        else:
            outs, sent = _together(xs, lefts, UNIT, clip=clip)
        arrays = [*outs, *lefts, *itertools.chain.from_iterable(sent)]
        results.append([array.tobytes() for array in arrays])
    assert results[0] == results[1]


@given(
    size=st.sampled_from(SIZES),
    lengths=st.lists(st.integers(1, 2100), min_size=1, max_size=3),
    seed=st.integers(0, 1000),
    clip=st.sampled_from([0.0, 1.0, 2.5]),
)
@settings(max_examples=40, deadline=None)
def test_what_comes_out_is_what_was_sent(
    size: int, lengths: list[int], seed: int, clip: float
) -> None:
    offsets = np.cumsum([0, *lengths])
    segments = tuple(
        Segment(str(number), (length,), int(offset))
        for number, (length, offset) in enumerate(zip(lengths, offsets, strict=False))
    )
    unit = Unit(segments, int(offsets[-1]))
    xs = _gradients(size, unit, seed)
    lefts = [np.zeros_like(x) for x in xs]
    outs, sent = _together(xs, lefts, unit, seed, clip)
    for out in outs:
        assert_same_bytes(out, outs[0])
    mean = np.mean([x.astype(np.float64) - left for x, left in zip(xs, lefts, strict=True)], 0)
    np.testing.assert_allclose(outs[0], mean, atol=1e-5)
    bytes_sent = sum(buffers[0].nbytes for buffers in sent)
    assert bytes_sent == _terngrad().payload_bytes(unit, size)
    for segment in segments:
        for x, left in zip(xs, lefts, strict=True):
            values = segment.of(x) - segment.of(left)
            scale = np.abs(values).max()
            zeros = np.isclose(values, 0, atol=1e-6)
            assert (zeros | np.isclose(np.abs(values), scale, rtol=1e-5)).all()


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("value", [2.0, -2.0, 3.4e38])
def test_lanes_do_not_carry(size: int, value: float) -> None:
    xs = [np.full(UNIT.size, value, np.float32) for _ in range(size)]
    outs, _ = _together(xs, None, UNIT)
    for segment in UNIT.segments:
        np.testing.assert_allclose(segment.of(outs[0]), value, rtol=1e-6)
    gaps = np.ones(UNIT.size, bool)
    for segment in UNIT.segments:
        segment.of(gaps)[...] = False
    assert gaps.any()
    assert not outs[0][gaps].any()


def test_lanes_are_the_smallest_that_hold_the_sum() -> None:
    wanted = {1: 2, 2: 4, 7: 4, 8: 8, 127: 8, 128: 16, 32767: 16}
    assert {size: lane_bits(size) for size in wanted} == wanted
    with pytest.raises(OptionError, match="32768"):
        _terngrad().payload_bytes(UNIT, 32768)


def test_unbiased_without_clipping() -> None:
    size, count = 3, 1500
    xs = _gradients(size, UNIT, 1)
    mean = np.mean(xs, axis=0, dtype=np.float64)
    total = np.zeros(UNIT.size)
    for number in range(count):
        total += _together(xs, None, UNIT, number)[0][0]
    for segment in UNIT.segments:
        largest = max(np.abs(segment.of(x)).max() for x in xs)
        # A rank's value has a variance below the square of the scale; seeds are fixed.
        bound = 6 * largest / np.sqrt(size * count)
        error = segment.of(total / count - mean)
        assert np.abs(error).max() <= bound
        assert abs(error.sum()) <= bound * np.sqrt(segment.size)


def test_ranks_and_steps_draw_differently() -> None:
    x = _gradients(1, UNIT, 0)[0]
    _, sent = _together([x, x], None, UNIT)
    assert sent[1][0].tobytes() != sent[1][1].tobytes()
    _, again = _together([x, x], None, UNIT, 1)
    assert sent[1][0].tobytes() != again[1][0].tobytes()


def test_clipping_is_at_standard_deviations() -> None:
    unit = Unit.single("w", (10_000,))
    x = np.random.default_rng(0).standard_normal(10_000).astype(np.float32)
    x[0] = 100
    _, sent = _together([x], None, unit, clip=2.5)
    np.testing.assert_allclose(sent[0][0], 2.5 * np.sqrt(np.mean(x.astype(np.float64) ** 2)))
    _, sent = _together([x], None, unit)
    assert sent[0][0] == 100
    constant = np.full(10_000, 3, np.float32)
    outs, _ = _together([constant], None, unit, clip=2.5)
    np.testing.assert_array_equal(outs[0], 3)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_a_rank_that_is_not_finite_shows_on_all(bad: float) -> None:
    xs = _gradients(3, UNIT, 0)
    xs[1][30] = bad
    with np.errstate(all="ignore"):
        outs, sent = _together(xs, None, UNIT, clip=2.5)
    assert len(sent) == 1
    assert all(np.isnan(out).all() for out in outs)


def test_options() -> None:
    assert _terngrad().reduction is Reduction.GLOBAL_SCALE
    for clip in ("-1", "nan", "inf"):
        with pytest.raises(OptionError, match="clip"):
            make(f"terngrad:clip={clip}")
