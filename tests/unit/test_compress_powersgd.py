"""PowerSGD against a reference in float64, and its kernels against NumPy."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from hpc_dl.comm import Communicator
from hpc_dl.compress import AllReduced, Floats, Segment, State, Step, Unit, make
from hpc_dl.compress.kernels import lowrank
from hpc_dl.errors import OptionError
from hpc_dl.reduce.exchange import make_exchange
from hpc_dl.testing import run_threads
from hpc_dl.testing.same import assert_same_bytes

pytestmark = pytest.mark.timeout(120)

#: A matrix, a convolution, a bias, a matrix too small to be worth it; gaps between them.
UNIT = Unit(
    (
        Segment("fc", (60, 40), 0),
        Segment("conv", (32, 6, 3, 3), 2400),
        Segment("bias", (10,), 4128),
        Segment("small", (4, 4), 4144),
    ),
    4160,
)
MATRICES = {"fc": (60, 40), "conv": (32, 54)}
Wide = NDArray[np.float64]


def _powersgd(spec: str = "") -> AllReduced:
    compressor = make("powersgd" + spec).compressor
    assert isinstance(compressor, AllReduced)
    return compressor


def _gradient(*seed: int, unit: Unit = UNIT) -> Floats:
    rng, flat = np.random.default_rng(seed), np.zeros(unit.size, np.float32)
    for segment in unit.segments:
        segment.of(flat)[...] = rng.standard_normal(segment.shape)
    return flat


def _alone(
    compressor: AllReduced, x: Floats, state: State, number: int = 0, unit: Unit = UNIT
) -> tuple[Floats, Floats, int]:
    """Run one rank; return what comes out, what is left, and the bytes of the buffers."""
    out, left = np.full_like(x, 7), np.full_like(x, 7)
    rounds = compressor.rounds(x, out, left, state, unit, Step(number))
    return out, left, sum(item.buffer.nbytes for item in rounds)


def _reference(
    q: dict[str, Wide], xs: list[Wide], iterations: int
) -> tuple[Wide, list[Wide], dict[str, Wide]]:
    """Take a step as the paper says it: return the average, the residuals and each Q."""
    out = np.mean(xs, axis=0)
    after = {}
    for name, shape in MATRICES.items():
        segment = next(item for item in UNIT.segments if item.name == name)
        matrices = [segment.of(x).reshape(shape) for x in xs]
        now = q[name]
        for _ in range(iterations):
            p = np.linalg.qr(np.mean([matrix @ now for matrix in matrices], axis=0))[0]
            now = np.mean([matrix.T @ p for matrix in matrices], axis=0)
        segment.of(out).reshape(shape)[...] = p @ now.T
        after[name] = now
    lefts = []
    for x in xs:
        left = np.zeros_like(x)
        for segment in UNIT.segments:
            if segment.name in MATRICES:
                segment.of(left)[...] = segment.of(x) - segment.of(out)
        lefts.append(left)
    return out, lefts, after


@pytest.mark.parametrize(("rank", "iterations"), [(1, 1), (3, 1), (4, 3)])
def test_several_steps_on_several_ranks_agree_with_float64(rank: int, iterations: int) -> None:
    ranks, steps = 3, 5
    scheme = make(f"powersgd:rank={rank},iterations={iterations}")

    def main(comm: Communicator) -> list[tuple[Floats, Floats]]:
        exchange = make_exchange(comm, UNIT, scheme)
        seen = []
        for step in range(steps):
            bucket = _gradient(step, comm.rank)
            exchange.run(bucket, step)
            seen.append((bucket, exchange.arrays()["residual"]))
        return seen

    found = run_threads(ranks, main)
    state = scheme.compressor.init(UNIT)
    q = {name: state[f"q.{name}"].T.astype(np.float64) for name in MATRICES}
    lefts = [np.zeros(UNIT.size) for _ in range(ranks)]
    for step in range(steps):
        xs = [lefts[r] + _gradient(step, r) for r in range(ranks)]
        out, lefts, q = _reference(q, xs, iterations)
        for r in range(ranks):
            np.testing.assert_array_equal(found[r][step][0], found[0][step][0])
            np.testing.assert_allclose(found[r][step][0], out, atol=2e-4)
            np.testing.assert_allclose(found[r][step][1], lefts[r], atol=2e-4)


def test_average_and_mean_residual_are_the_mean_gradient() -> None:
    def main(comm: Communicator) -> tuple[Floats, Floats]:
        exchange = make_exchange(comm, UNIT, make("powersgd:rank=2"))
        bucket = _gradient(comm.rank)
        exchange.run(bucket, 0)
        return bucket, exchange.arrays()["residual"]

    found = run_threads(4, main)
    original = np.mean([_gradient(rank) for rank in range(4)], axis=0)
    rest = np.mean([left for _, left in found], axis=0)
    np.testing.assert_allclose(found[0][0] + rest, original, atol=1e-5)
    # What is small or a vector is sent as it is, and nothing of it is left.
    np.testing.assert_allclose(found[0][0][4128:], original[4128:], atol=1e-6)
    assert not rest[4128:].any()


@pytest.mark.parametrize("true_rank", [1, 2, 4])
@pytest.mark.parametrize("scale", [1e-25, 1.0, 1e25])
def test_a_matrix_of_low_rank_is_exact(true_rank: int, scale: float) -> None:
    rng = np.random.default_rng(true_rank)
    unit = Unit.single("w", (70, 50))
    exact = rng.standard_normal((70, true_rank)) @ rng.standard_normal((true_rank, 50)) * scale
    x = exact.astype(np.float32).reshape(-1)
    compressor = _powersgd(":rank=4")
    state = compressor.init(unit)
    for step in range(3):
        out, left, _ = _alone(compressor, x, state, step, unit)
        np.testing.assert_array_equal(left, x - out)
    np.testing.assert_allclose(out, x, atol=1e-5 * scale)


def test_iterations_come_nearer_to_the_best_approximation() -> None:
    x = _gradient(0)
    errors = [
        np.linalg.norm(_alone(compressor, x, compressor.init(UNIT))[1])
        for compressor in (_powersgd(f":rank=2,iterations={n}") for n in (1, 2, 8))
    ]
    assert errors[0] > errors[1] > errors[2]


def test_nothing_from_nothing_and_it_goes_on_from_there() -> None:
    compressor = _powersgd()
    state = compressor.init(UNIT)
    for step in range(2):
        out, left, _ = _alone(compressor, np.zeros(UNIT.size, np.float32), state, step)
        assert not out.any()
        assert not left.any()
    x = _gradient(0)
    out, _, _ = _alone(compressor, x, state, 2)
    assert np.isfinite(out).all()
    assert np.dot(out, x) > 0.1 * np.dot(x, x)


@pytest.mark.parametrize("spoiled", [np.nan, np.inf, 0.0])
def test_a_q_that_is_good_for_nothing_is_drawn_anew_alike(spoiled: float) -> None:
    compressor, outs = _powersgd(), []
    for _ in range(2):
        state = compressor.init(UNIT)
        state["q.fc"][1] = spoiled
        state["q.conv"] = np.ones((9, 54), np.float32)  # saved with another rank
        outs.append(_alone(compressor, _gradient(0), state)[0])
        assert all(np.isfinite(q).all() and q.shape[0] == 4 for q in state.values())
    assert np.isfinite(outs[0]).all()
    np.testing.assert_array_equal(*outs)


def test_a_gradient_that_is_not_finite_leaves_no_trace() -> None:
    def main(comm: Communicator) -> None:
        exchange = make_exchange(comm, UNIT, make("powersgd"))
        exchange.run(_gradient(comm.rank), 0)
        before = {key: value.copy() for key, value in exchange.arrays().items()}
        bad = _gradient(comm.rank)
        if comm.rank == 1:
            bad[5] = np.nan
        exchange.run(bad, 1)
        assert np.isnan(UNIT.segments[0].of(bad)).all()
        after = exchange.arrays()
        assert {"state.q.fc", "state.q.conv"} < set(after)
        for key in ("state.q.fc", "state.q.conv"):
            np.testing.assert_array_equal(before[key], after[key])
        assert np.isfinite(after["residual"]).all()

    run_threads(2, main)


@pytest.mark.parametrize("spec", ["", ":rank=1", ":iterations=3", ":rank=100"])
def test_the_payload_is_what_is_sent(spec: str) -> None:
    compressor = _powersgd(spec)
    sent = _alone(compressor, _gradient(0), compressor.init(UNIT))[2]
    assert sent == compressor.payload_bytes(UNIT, 1)


def test_without_warm_start_nothing_is_kept_and_each_step_draws_anew() -> None:
    compressor = _powersgd(":warm_start=false,rank=1")
    state: State = compressor.init(UNIT)
    outs = [_alone(compressor, _gradient(0), state, step)[0] for step in (0, 0, 1)]
    assert not state
    np.testing.assert_array_equal(outs[0], outs[1])
    assert (outs[0][:4000] != outs[2][:4000]).any()


@pytest.mark.parametrize("option", ["rank=0", "iterations=0"])
def test_bad_options(option: str) -> None:
    with pytest.raises(OptionError, match=f"{option}; give"):
        make(f"powersgd:{option}")


def _rows(rank: int, size: int, kind: str, seed: int) -> Floats:
    rows = np.random.default_rng(seed).standard_normal((rank, size)).astype(np.float32)
    if kind == "zero":
        rows[:] = 0
    elif kind == "dependent":
        rows[:] = rows[0] * np.arange(1, rank + 1, dtype=np.float32)[:, None]
    elif kind == "extreme":
        rows[0] *= np.float32(5e37)
        rows[-1] *= np.float32(1e-40)
    elif kind == "not finite":
        rows[rank // 2, 0] = np.nan
        rows[-1] = np.inf
    return rows


@settings(max_examples=60, deadline=None)
@given(
    rank=st.integers(1, 7),
    more=st.integers(8, 300),
    kind=st.sampled_from(["normal", "zero", "dependent", "extreme", "not finite"]),
    seed=st.integers(0, 2**32 - 1),
)
def test_rows_become_orthonormal_with_the_same_bytes(
    rank: int, more: int, kind: str, seed: int
) -> None:
    with np.errstate(all="ignore"):
        rows = _rows(rank, rank + more, kind, seed)
        slow = rows.copy()
        lowrank.orthonormalise.reference(slow, seed)
        lowrank.orthonormalise(rows, seed)
    assert_same_bytes(rows, slow)
    np.testing.assert_allclose(rows @ rows.T, np.eye(rank), atol=5e-5)


@settings(max_examples=40, deadline=None)
@given(
    rank=st.integers(1, 7),
    height=st.integers(1, 20),
    width=st.integers(1, 1100),
    keep=st.booleans(),
)
def test_products_have_the_same_bytes(rank: int, height: int, width: int, keep: bool) -> None:
    rng = np.random.default_rng(width)
    p, q, x = (
        rng.standard_normal(shape, np.float32)
        for shape in ((rank, height), (rank, width), (height, width))
    )
    found = [np.zeros((2, height, width), np.float32) for _ in range(2)]
    lowrank.multiply(p, q, x, *found[0], keep)
    lowrank.multiply.reference(p, q, x, *found[1], keep)
    assert_same_bytes(found[0], found[1])
    np.testing.assert_allclose(found[0][0], p.T @ q, atol=1e-4)
    if keep:
        np.testing.assert_array_equal(found[0][1], x - found[0][0])
