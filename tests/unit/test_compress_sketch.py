"""Sketches: what is sent is linear, what is large is recovered, and nothing is lost."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hpc_dl.comm import Communicator
from hpc_dl.compress import AllReduced, Floats, Step, Unit, make
from hpc_dl.compress.kernels import countsketch, hadamard
from hpc_dl.errors import OptionError
from hpc_dl.reduce.exchange import make_exchange
from hpc_dl.testing import run_threads
from hpc_dl.testing.same import assert_same_bytes

pytestmark = pytest.mark.timeout(120)

KINDS = ["count", "projection"]
#: About the number of entries of a block, and of those of a run.
SIZES = st.one_of(st.integers(1, 200), st.integers(1000, 1050), st.integers(2000, 4100))


def _normal(size: int, *seed: int) -> Floats:
    return np.random.default_rng(seed).standard_normal(size, np.float32)


def _run(
    spec: str, x: Floats, step: int = 0, feedback: bool = True
) -> tuple[Floats, Floats | None, Floats]:
    """Run one rank; return what comes out, what is left, and the sketch."""
    compressor = make(f"sketch:{spec}").compressor
    assert isinstance(compressor, AllReduced)
    out, left = np.full_like(x, 7), np.full_like(x, 7) if feedback else None
    unit = Unit.single("w", (len(x),))
    (sketch,) = [
        item.buffer.copy() for item in compressor.rounds(x, out, left, {}, unit, Step(step))
    ]
    assert sketch.nbytes == compressor.payload_bytes(unit, 1)
    return out, left, sketch


def _sparse(size: int, count: int, *seed: int, noise: float = 0.0) -> Floats:
    """Return some large entries, of random places and signs, in noise."""
    rng = np.random.default_rng(seed)
    x = _normal(size, *seed, 1) * np.float32(noise)
    x[rng.choice(size, count, replace=False)] = rng.uniform(5, 10, count) * rng.choice(
        [-1, 1], count
    )
    return x


@settings(max_examples=50, deadline=None)
@given(
    size=SIZES,
    width=st.integers(1, 400),
    run=st.integers(1, 64),
    key=st.integers(0, 2**32 - 1),
    scale=st.sampled_from([0.0, 1e-40, 1.0, 1e30]),
)
def test_count_sketches_have_the_same_bytes(
    size: int, width: int, run: int, key: int, scale: float
) -> None:
    run = min(run, width)
    x = _normal(size, key) * np.float32(scale)
    runs = np.arange(-(-size // run), dtype=np.uint32)
    starts = np.stack([countsketch.places(key + t & 0xFFFFFFFF, runs, width) for t in range(6)])
    tables = [np.zeros((6, width + run), np.float32) for _ in range(2)]
    countsketch.encode(x, starts, key, run, tables[0])
    countsketch.encode.reference(x, starts, key, run, tables[1])
    assert_same_bytes(tables[0], tables[1])
    found = [np.empty_like(x) for _ in range(2)]
    countsketch.estimate(tables[0], starts, key, run, found[0])
    countsketch.estimate.reference(tables[0], starts, key, run, found[1])
    np.testing.assert_array_equal(*found)


@settings(max_examples=50, deadline=None)
@given(
    size=SIZES,
    rows=st.integers(1, 1024),
    key=st.integers(0, 2**32 - 1),
    scale=st.sampled_from([0.0, 1e-40, 1.0, 1e30]),
)
def test_projections_have_the_same_bytes(size: int, rows: int, key: int, scale: float) -> None:
    x = _normal(size, key) * np.float32(scale)
    order = np.random.default_rng(key).permutation(hadamard.BLOCK)[:rows]
    found = [np.empty(-(-size // hadamard.BLOCK) * rows, np.float32) for _ in range(2)]
    hadamard.encode(x, key, order, found[0])
    hadamard.encode.reference(x, key, order, found[1])
    assert_same_bytes(found[0], found[1])


def test_the_transform_is_orthogonal_and_of_signs() -> None:
    matrix = hadamard.transform(np.eye(hadamard.BLOCK, dtype=np.float32))
    assert set(np.unique(matrix)) == {-1, 1}
    np.testing.assert_array_equal(matrix @ matrix, hadamard.BLOCK * np.eye(hadamard.BLOCK))
    # The signs from parities, which the recovery uses, are those of the transform.
    places = np.arange(hadamard.BLOCK)
    turned = places % hadamard.SIDE * hadamard.SIDE + places // hadamard.SIDE
    np.testing.assert_array_equal(matrix, hadamard.parities()[places[:, None] & turned])


@settings(max_examples=15, deadline=None)
@given(size=SIZES, rows=st.integers(16, 200), key=st.integers(0, 2**32 - 1))
def test_recovery_agrees_with_its_reference(size: int, rows: int, key: int) -> None:
    x = _sparse(size, max(1, size // 400), key)
    order = np.random.default_rng(key).permutation(hadamard.BLOCK)[:rows]
    y = np.empty(-(-size // hadamard.BLOCK) * rows, np.float32)
    hadamard.encode(x, key, order, y)
    found, sums = [np.empty_like(x) for _ in range(2)], np.zeros((2, 2))
    for number, function in enumerate((hadamard.recover, hadamard.recover.reference)):
        function(y, key, order, rows - 4, 8, 5, hadamard.parities(), found[number], sums[number])
    np.testing.assert_allclose(*found, atol=1e-3)
    np.testing.assert_allclose(*sums, rtol=1e-3, atol=1e-3)


@settings(max_examples=30, deadline=None)
@given(kind=st.sampled_from(KINDS), size=SIZES, seed=st.integers(0, 2**32 - 1))
def test_what_comes_out_and_what_is_left_are_the_gradient(kind: str, size: int, seed: int) -> None:
    x = _normal(size, seed)
    out, left, _ = _run(f"kind={kind}", x)
    assert left is not None
    np.testing.assert_array_equal(left, x - out)
    # No larger than the gradient itself: what was found has been checked.
    assert np.linalg.norm(out) <= 2 * np.linalg.norm(x)
    again, _, _ = _run(f"kind={kind}", x, feedback=False)
    np.testing.assert_array_equal(again, out)


@pytest.mark.parametrize("kind", KINDS)
def test_a_sketch_is_linear_and_differs_from_step_to_step(kind: str) -> None:
    x, y = _normal(3000, 0), _normal(3000, 1)
    sketches = [_run(f"kind={kind}", z)[2] for z in (x, y, x + 2 * y)]
    np.testing.assert_allclose(sketches[0] + 2 * sketches[1], sketches[2], atol=1e-3)
    assert (_run(f"kind={kind}", x, step=1)[2] != sketches[0]).any()


@pytest.mark.parametrize(
    ("spec", "size", "count", "most"),
    [
        ("kind=count,ratio=0.2", 100_000, 100, 0.1),
        ("kind=count,ratio=0.5", 100_000, 500, 0.1),
        ("kind=projection", 20_480, 20, 0.02),
        ("kind=projection,ratio=0.2,keep=0.02", 20_480, 80, 1e-6),
    ],
)
def test_few_large_entries_are_recovered(spec: str, size: int, count: int, most: float) -> None:
    for seed in range(3):
        x = _sparse(size, count, seed)
        left = _run(spec, x, seed)[1]
        assert left is not None
        assert np.dot(left, left) <= most * np.dot(x, x)


@pytest.mark.parametrize("kind", KINDS)
def test_zeros_come_out_as_zeros(kind: str) -> None:
    out, left, sketch = _run(f"kind={kind}", np.zeros(1500, np.float32))
    assert left is not None
    assert not out.any()
    assert not left.any()
    assert not sketch.any()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("value", [3e38, np.nan])
def test_what_overflows_is_not_finite_on_all_ranks_alike(kind: str, value: float) -> None:
    def main(comm: Communicator) -> None:
        exchange = make_exchange(comm, Unit.single("w", (5000,)), make(f"sketch:kind={kind}"))
        bucket = np.full(5000, value if comm.rank else 1, np.float32)
        exchange.run(bucket, 0)
        assert np.isnan(bucket).all() or np.isfinite(bucket).all()
        assert np.isnan(bucket).all() == bool(comm.exchange(np.isnan(bucket[:1])).all())
        assert np.isfinite(exchange.arrays()["residual"]).all()

    with np.errstate(all="ignore"):
        run_threads(2, main)


@pytest.mark.parametrize("kind", KINDS)
def test_ranks_agree_and_error_feedback_loses_nothing(kind: str) -> None:
    """Even of noise, of which little is recovered, the residual does not run away."""
    size, steps, ranks = 6000, 30, 3

    def main(comm: Communicator) -> tuple[Floats, Floats]:
        exchange = make_exchange(comm, Unit.single("w", (size,)), make(f"sketch:kind={kind}"))
        came = np.zeros(size)
        for step in range(steps):
            bucket = _normal(size, comm.rank, step)
            exchange.run(bucket, step)
            came += bucket
        return came, exchange.arrays()["residual"]

    found = run_threads(ranks, main)
    total = sum(_normal(size, rank, step) for rank in range(ranks) for step in range(steps))
    rest = np.mean([left for _, left in found], axis=0)
    for came, left in found:
        np.testing.assert_array_equal(came, found[0][0])
        # As much as if nothing were ever sent, about.
        assert np.linalg.norm(left) < 1.2 * np.sqrt(size * steps)
    np.testing.assert_allclose(found[0][0] + rest, total / ranks, atol=1e-3)


@pytest.mark.parametrize("option", ["ratio=0.0", "keep=-1", "keep=0.2", "recovery_steps=0"])
def test_bad_options(option: str) -> None:
    with pytest.raises(OptionError, match=f"{option}.*give"):
        make(f"sketch:{option}")
    with pytest.raises(OptionError, match="kind"):
        make("sketch:kind=pencil")
