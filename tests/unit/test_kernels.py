"""The kernels: compiled and NumPy code agree bit for bit, and every way to cut a buffer."""

import itertools
import sys
import warnings
from collections.abc import Sequence

import numpy as np
import pytest
import torch  # noqa: F401  (so that 16-bit sums go through it unless a test hides it)
from hypothesis import given
from hypothesis import strategies as st

from hpc_dl.arrays import BFLOAT16, HALF_TYPES
from hpc_dl.comm import Op, fused, kernels
from hpc_dl.comm.kernels import combine, reduce_in_place, scale_in_place, share
from hpc_dl.comm.protocol import Array
from hpc_dl.testing.same import assert_same_bytes

FLOATS = [np.dtype(np.float32), np.dtype(np.float64)]
UFUNCS = {Op.SUM: np.add, Op.MIN: np.minimum, Op.MAX: np.maximum, Op.PRODUCT: np.multiply}


def _buffers(size: int, length: int, dtype: np.dtype[np.generic], seed: int = 0) -> list[Array]:
    rng = np.random.default_rng(seed)
    return [(4 * rng.standard_normal(length)).astype(dtype) for _ in range(size)]


def _in_rank_order(buffers: Sequence[Array], op: Op, scale: float) -> Array:
    """Say in three lines what the kernels do."""
    wide = np.dtype(np.float32) if buffers[0].dtype in HALF_TYPES else buffers[0].dtype
    total = buffers[0].astype(wide)
    for buffer in buffers[1:]:
        total = UFUNCS[op](total, buffer.astype(wide))
    return (total * wide.type(scale)).astype(buffers[0].dtype)


@given(
    size=st.integers(1, 5),
    length=st.integers(0, 3000),
    chunk=st.sampled_from([64, 1000, 4096, 1 << 20]),
    op=st.sampled_from(list(UFUNCS)),
    dtype=st.sampled_from([*FLOATS, *HALF_TYPES]),
    scale=st.sampled_from([1.0, 0.3]),
    data=st.data(),
)
def test_any_part_in_any_chunks(
    size: int,
    length: int,
    chunk: int,
    op: Op,
    dtype: np.dtype[np.generic],
    scale: float,
    data: st.DataObject,
) -> None:
    lo = data.draw(st.integers(0, length))
    hi = data.draw(st.integers(lo, length))
    buffers = _buffers(size, length, dtype)
    want = [buffer.copy() for buffer in buffers]
    total = _in_rank_order(buffers, op, scale)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kernels, "CHUNK_BYTES", chunk)
        reduce_in_place(buffers, lo, hi, op, scale)
    for got, before in zip(buffers, want, strict=True):
        before[lo:hi] = total[lo:hi]
        np.testing.assert_array_equal(got, before)


@pytest.mark.parametrize("dtype", [*FLOATS, *HALF_TYPES, np.dtype(np.int32)], ids=str)
@pytest.mark.parametrize("scale", [1.0, 0.25])
def test_one_source_among_several_targets(dtype: np.dtype[np.generic], scale: float) -> None:
    """The source may be one of the targets, and is scaled once."""
    if dtype.kind == "i" and scale != 1.0:
        scale = 1.0
    buffers = _buffers(3, 100_000, dtype)
    want = _in_rank_order(buffers[:1], Op.SUM, scale)
    reduce_in_place(buffers[:1], 0, 100_000, Op.SUM, scale, out=buffers)
    for buffer in buffers:
        np.testing.assert_array_equal(buffer, want)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("size", [2, 3, 4, 7])
@pytest.mark.parametrize("targets", ["all", "first", "other"])
@pytest.mark.parametrize("length", [fused.BLOCK - 1, 3 * fused.BLOCK + 5])
def test_compiled_sum_gives_the_bits_of_numpy(
    monkeypatch: pytest.MonkeyPatch,
    dtype: np.dtype[np.generic],
    size: int,
    targets: str,
    length: int,
) -> None:
    pytest.importorskip("numba")
    monkeypatch.setattr(fused, "MIN_BYTES", 1)
    results = []
    for compiled in (True, False):
        if not compiled:
            monkeypatch.setattr(fused, "_compiled", lambda: None)
        buffers = _buffers(size, length, dtype)
        buffers[0][3:6] = np.inf, np.nan, -0.0
        other = np.zeros(length, dtype)
        out = {"all": None, "first": buffers[:1], "other": [other]}[targets]
        copies = [buffer.copy() for buffer in buffers]
        assert fused.sum_into(copies, copies, 0, length, 1.0) is compiled
        reduce_in_place(buffers, 2, length - 1, Op.SUM, 1 / 3, out)
        results.append(np.stack([*buffers, other]).tobytes())
    assert results[0] == results[1]


def test_compiled_sum_takes_only_what_it_can(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("numba")
    long = fused.MIN_BYTES // 4
    x, y = np.ones(2 * long, np.float32), np.ones(2 * long, np.float32)
    assert fused.sum_into([x, y], [x], 0, long, 1.0)
    assert not fused.sum_into([x, y], [x], 0, long - 1, 1.0)
    assert not fused.sum_into([x], [x], 0, long, 1.0)
    assert not fused.sum_into([x[::2], y[::2]], [x[::2]], 0, long, 1.0)
    whole = x.astype(np.int64)
    assert not fused.sum_into([whole, whole], [whole], 0, long, 1.0)
    odd = np.frombuffer(bytearray(8 * long + 1), np.uint8)[1:].view(np.float32)
    assert not fused.sum_into([x, odd], [x], 0, long, 1.0)


def test_without_numba(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "numba", None)
    fused._compiled.cache_clear()
    try:
        buffers = _buffers(2, 100_000, FLOATS[0])
        want = _in_rank_order(buffers, Op.SUM, 1.0)
        reduce_in_place(buffers, 0, 100_000, Op.SUM)
        np.testing.assert_array_equal(buffers[1], want)
        assert fused._compiled() is None
    finally:
        monkeypatch.undo()
        fused._compiled.cache_clear()


@pytest.mark.parametrize("dtype", HALF_TYPES, ids=str)
@pytest.mark.parametrize("op", list(UFUNCS), ids=str)
def test_halves_give_the_same_bits_with_and_without_torch(
    monkeypatch: pytest.MonkeyPatch, dtype: np.dtype[np.generic], op: Op
) -> None:
    with_torch = _buffers(3, 70_001, dtype)
    without = [buffer.copy() for buffer in with_torch]
    scale = 1 / 3 if op is Op.SUM else 1.0
    reduce_in_place(with_torch, 0, 70_001, op, scale)
    monkeypatch.delitem(sys.modules, "torch")
    reduce_in_place(without, 0, 70_001, op, scale)
    assert_same_bytes(with_torch[0], without[0])


@pytest.mark.parametrize("dtype", [*FLOATS, *HALF_TYPES], ids=str)
def test_overflow_is_no_warning(dtype: np.dtype[np.generic]) -> None:
    largest = np.finfo(np.float32).max if dtype == BFLOAT16 else np.finfo(dtype).max
    for length in (3, 100_000):
        buffers = [np.full(length, largest, dtype) for _ in range(2)]
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            reduce_in_place(buffers, 0, length, Op.SUM)
        assert np.isinf(buffers[1].astype(np.float64)).all()


@pytest.mark.parametrize("dtype", [*FLOATS, *HALF_TYPES, np.dtype(np.int64)], ids=str)
def test_combine_leaves_its_arguments_alone(dtype: np.dtype[np.generic]) -> None:
    parts = [buffer.reshape(50, 2) for buffer in _buffers(3, 100, dtype)]
    before = [part.copy() for part in parts]
    total = combine(parts, Op.SUM)
    want = _in_rank_order([part.reshape(-1) for part in before], Op.SUM, 1.0)
    np.testing.assert_array_equal(total, want.reshape(50, 2))
    np.testing.assert_array_equal(parts, before)
    assert not any(np.may_share_memory(total, part) for part in parts)


def test_scale_in_place() -> None:
    x = np.full(5, 3, np.float16)
    scale_in_place(x, 1 / 3)
    np.testing.assert_array_equal(x, 1)
    scale_in_place(x[:0], 2.0)


@given(st.integers(0, 5000), st.integers(1, 9), st.sampled_from([1, 4, 16]))
def test_shares_cover_everything_once(length: int, size: int, align: int) -> None:
    bounds = [share(length, rank, size, align) for rank in range(size)]
    assert bounds[0][0] == 0
    assert bounds[-1][1] == length
    assert all(end == start for (_, end), (start, _) in itertools.pairwise(bounds))
    assert all(lo <= hi for lo, hi in bounds)
    assert all(lo % align == 0 for lo, _ in bounds if lo < length)
    lengths = [hi - lo for lo, hi in bounds]
    assert max(lengths) - min(lengths) <= 2 * align
