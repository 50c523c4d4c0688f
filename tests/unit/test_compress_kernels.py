"""Kernels: compiled loops and NumPy give the same bytes, and the right ones."""

import logging
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from hpc_dl.comm import Communicator
from hpc_dl.compress import Floats, Unit, make
from hpc_dl.compress.kernels import casts, checks, compile, maxabs, signs, topk
from hpc_dl.compress.kernels.compile import Kernel
from hpc_dl.compress.kernels.draw import hash_of, uniform_of
from hpc_dl.compress.random import hashed, uniform
from hpc_dl.compress.signs import OneBit, SignSgd
from hpc_dl.reduce.exchange import make_exchange
from hpc_dl.testing import run_threads
from hpc_dl.testing.same import assert_same_bytes

pytestmark = pytest.mark.timeout(120)

BFLOAT16 = casts.BFLOAT16
LENGTHS = st.sampled_from([1, 7, 8, 31, 32, 33, 1000, 1024, 1025, 3000])
KERNELS = {
    "to_bfloat16": casts.to_bfloat16,
    "from_bfloat16": casts.from_bfloat16,
    "is_finite": checks._finite_kernel,
    "maxabs.encode": maxabs.encode,
    "maxabs.decode": maxabs.decode,
    "select": topk.select,
    "scatter_add": topk.scatter_add,
    "signs.encode": signs.encode,
    "signs.decode": signs.decode,
    "signs.pack": signs.pack,
}


@st.composite
def floats(draw: st.DrawFn, largest: float = 3e38) -> Floats:
    """Draw gradients: dense, mostly zero, constant, tiny, huge."""
    size = draw(LENGTHS)
    random = np.random.default_rng(draw(st.integers(0, 2**32)))
    x = random.standard_normal(size, np.float32)
    kind = draw(st.sampled_from(["normal", "sparse", "constant", "denormal", "huge", "odd"]))
    if kind == "sparse":
        x[random.random(size) < 0.95] = 0
    elif kind == "constant":
        x[:] = draw(st.sampled_from([0.0, -0.0, 1.0, -3.0, 1e-40]))
    elif kind == "denormal":
        x *= np.float32(1e-41)
    elif kind == "huge":
        x = (np.tanh(x) * np.float32(largest)).astype(np.float32)
    elif kind == "odd":
        values = draw(
            hnp.arrays(
                np.float32,
                min(size, 8),
                elements=st.floats(
                    -float(np.float32(largest)), float(np.float32(largest)), width=32
                ),
            )
        )
        x[: len(values)] = values
    return x


def both(kernel: Kernel, *args: Any) -> tuple[list[Any], list[Any]]:
    """Run both codes on copies; return all arguments as they are then, and the result."""
    found: list[list[Any]] = []
    for code in (kernel.reference, kernel.fastest):
        mine = [arg.copy() if isinstance(arg, np.ndarray) else arg for arg in args]
        with np.errstate(all="ignore"):
            result = code(*mine)
        found.append([*mine, result])
    return found[0], found[1]


def check_equal(kernel: Kernel, *args: Any) -> list[Any]:
    one, other = both(kernel, *args)
    for a, b in zip(one, other, strict=True):
        if isinstance(a, np.ndarray):
            assert_same_bytes(a, b)
        else:
            assert a == b
    return one


@pytest.mark.skipif(not compile.available(), reason="numba is not installed")
@pytest.mark.parametrize("name", KERNELS)
def test_both_codes_are_there(name: str) -> None:
    assert KERNELS[name].fastest is not KERNELS[name].reference


# --- random numbers -----------------------------------------------------------------


def _draw(key: int, start: int, words: Any, draws: Any) -> None:
    for i in range(len(words)):
        words[i] = hash_of(key, start + i)
        draws[i] = uniform_of(key, start + i)


def _draw_reference(key: int, start: int, words: Any, draws: Any) -> None:
    counters = (start + np.arange(len(words))).astype(np.uint32)
    words[:] = hashed(key, counters)
    draws[:] = [uniform(key, 1, int(counter))[0] for counter in counters]


DRAW = Kernel(_draw, _draw_reference)


@settings(deadline=None)
@given(key=st.integers(0, 2**32 - 1), start=st.integers(0, 2**33), count=st.integers(1, 50))
def test_loops_draw_what_numpy_draws(key: int, start: int, count: int) -> None:
    check_equal(DRAW, key, start, np.zeros(count, np.uint32), np.zeros(count, np.float32))


# --- casts --------------------------------------------------------------------------

SPECIAL = np.array(
    [
        *(0, 1, 0x007FFFFF, 0x00800000, 0x00008000, 0x00018000, 0x00017FFF),  # zero, denormals
        *(0x7F7FFFFF, 0x7F7F8000, 0x7F7F7FFF, 0x7F800000),  # the largest, infinity
        *(0x7F800001, 0x7FC00000, 0x7FFFFFFF, 0x7FA12345),  # NaN
        *(0x3F808000, 0x3F818000, 0x3F808001, 0x3F807FFF),  # ties
    ],
    np.uint32,
)
BITS = np.concatenate([SPECIAL, SPECIAL | np.uint32(1 << 31)])
ANY_BITS = hnp.arrays(np.uint32, st.integers(1, 100), elements=st.integers(0, 2**32 - 1))


def _as_ml_dtypes(bits: Any) -> Any:
    with np.errstate(invalid="ignore", over="ignore"):
        return bits.view(np.float32).astype(ml_dtypes.bfloat16).view(np.uint16)


@settings(deadline=None)
@given(ANY_BITS)
def test_bfloat16_is_that_of_ml_dtypes_to_the_bit(drawn: Any) -> None:
    bits = np.concatenate([BITS, drawn])
    _, out, _ = check_equal(casts.to_bfloat16, bits, np.zeros(len(bits), np.uint16))
    np.testing.assert_array_equal(out, _as_ml_dtypes(bits))


def test_every_bfloat16_comes_back() -> None:
    short = np.arange(1 << 16, dtype=np.uint32).astype(np.uint16)
    _, wide, _ = check_equal(casts.from_bfloat16, short, np.zeros(1 << 16, np.uint32))
    values = wide.view(np.float32)
    with np.errstate(invalid="ignore"):
        np.testing.assert_array_equal(values, short.view(BFLOAT16).astype(np.float32))
    narrow = check_equal(casts.to_bfloat16, wide, np.zeros(1 << 16, np.uint16))[1]
    np.testing.assert_array_equal(narrow[~np.isnan(values)], short[~np.isnan(values)])


@pytest.mark.parametrize("loaded", [True, False])
@pytest.mark.parametrize("dtype", [np.dtype(np.float16), BFLOAT16, np.dtype(np.float32)], ids=str)
def test_casts_are_those_of_numpy_with_and_without_torch(
    dtype: np.dtype[Any], loaded: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if loaded:
        pytest.importorskip("torch")
    else:
        monkeypatch.delitem(sys.modules, "torch", raising=False)
    x = BITS.view(np.float32)
    x = np.concatenate([x, np.float32([65504, 65519, 65520, 1e-8, 6e-8, 2.98e-8])])
    with np.errstate(all="ignore"):
        expected = x.astype(dtype).astype(np.float32)
    found = casts.narrow(x, dtype)
    assert found.dtype == dtype
    np.testing.assert_array_equal(found.astype(np.float32), expected)
    wide = np.empty(len(x), np.float32)
    casts.widen(found, wide)
    np.testing.assert_array_equal(wide, expected)
    # Memory that is only lent, for instance by a framework.
    x.flags.writeable = found.flags.writeable = False
    np.testing.assert_array_equal(casts.narrow(x, dtype).astype(np.float32), expected)
    wide.fill(7)
    casts.widen(found, wide)
    np.testing.assert_array_equal(wide, expected)


# --- finite -------------------------------------------------------------------------


@settings(deadline=None)
@given(floats(), st.data())
def test_finite_below_2_to_100(x: Floats, data: st.DataObject) -> None:
    if data.draw(st.booleans()):
        place = data.draw(st.integers(0, len(x) - 1))
        x[place] = data.draw(
            st.sampled_from([np.nan, np.inf, -np.inf, 2.0**100, -(2.0**100), 1.2676505e30])
        )
    found = check_equal(checks._finite_kernel, x.view(np.uint32))[-1]
    assert found == checks.is_finite(x) == bool((np.abs(x) < 2.0**100).all())


def test_the_last_value_counts_too() -> None:
    for size in (1, 4095, 4096, 4097, 10_000):
        x = np.zeros(size, np.float32)
        assert checks.is_finite(x)
        x[-1] = np.nan
        assert not checks.is_finite(x)
    assert checks.is_finite(np.empty(0, np.float32))


# --- eight bits ---------------------------------------------------------------------


@settings(deadline=None)
@given(floats())
def test_eight_bits_are_off_by_half_a_step_of_their_block(x: Floats) -> None:
    blocks = -(-len(x) // maxabs.BLOCK)
    scales, levels = np.zeros(blocks, np.float32), np.zeros(len(x), np.int8)
    _, scales, levels, _ = check_equal(maxabs.encode, x, scales, levels)
    out = check_equal(maxabs.decode, scales, levels, np.full(len(x), 7, np.float32))[2]
    assert np.isfinite(out).all()
    for number, scale in enumerate(scales):
        part = slice(number * maxabs.BLOCK, (number + 1) * maxabs.BLOCK)
        largest = np.abs(x[part]).max()
        assert scale == pytest.approx(largest / 127, rel=1e-6, abs=1e-45)
        error = np.abs(out[part].astype(np.float64) - x[part]).max()
        assert error <= max(0.5001 * largest / 127, 127e-37 * 1.01 if scale <= 1e-37 else 0)


# --- selection ----------------------------------------------------------------------


@settings(deadline=None)
@given(floats(1e37), st.booleans(), st.booleans(), st.data())
def test_selection_is_that_of_a_sort(
    x: Floats, keep: bool, clear: bool, data: st.DataObject
) -> None:
    left = x[::-1] / np.float32(2) if keep else np.empty(0, np.float32)
    whole = left + x if keep else x.copy()
    order = np.sort(np.abs(whole))[::-1]
    count = data.draw(st.integers(1, len(x)))
    threshold = order[count - 1]
    room = data.draw(st.sampled_from([count, max(1, count // 2), len(x)]))
    indices, values = np.full(room, -1, np.int32), np.zeros(room, np.float32)
    after = check_equal(topk.select, x, left, keep, threshold, indices, values, clear)
    _, rest, _, _, indices, values, _, found = after
    expected = np.flatnonzero(np.abs(whole) >= threshold)
    assert found == min(room, len(expected))
    np.testing.assert_array_equal(indices[:found], expected[:room])
    np.testing.assert_array_equal(values[:found], whole[expected[:room]])
    if keep:
        whole[expected[:room]] = 0 if clear else whole[expected[:room]]
        np.testing.assert_array_equal(rest, whole)


@settings(deadline=None)
@given(floats(), st.lists(st.integers(0, 2**31), max_size=50))
def test_entries_are_added_where_they_belong(out: Floats, drawn: list[int]) -> None:
    """Also several to one place, in their order."""
    indices = np.array([i % len(out) for i in drawn], np.int32)
    values = np.arange(len(indices), dtype=np.float32) / 3
    expected = out.copy()
    for i, value in zip(indices, values, strict=True):
        expected[i] += value
    found = check_equal(topk.scatter_add, indices, values, out)[2]
    np.testing.assert_array_equal(found, expected)


# --- signs --------------------------------------------------------------------------


@settings(deadline=None)
@given(floats(1e34), floats(1e34))
def test_signs_and_what_they_leave(x: Floats, left: Floats) -> None:
    size = min(len(x), len(left))
    x, left = x[:size].copy(), left[:size].copy()
    whole = left + x
    blocks = -(-size // signs.BLOCK)
    scales, bits = np.full(blocks, 7, np.float32), np.full(-(-size // 8), 7, np.uint8)
    _, rest, scales, bits, _ = check_equal(signs.encode, x, left, scales, bits)
    before = np.full(size, 3, np.float32)
    out = check_equal(signs.decode, scales, bits, before, False)[2]
    added = check_equal(signs.decode, scales, bits, before, True)[2]
    np.testing.assert_array_equal(added, before + out)
    np.testing.assert_array_equal(rest, whole - out)
    negative = whole < 0
    assert (np.signbit(out[out != 0]) == negative[out != 0]).all()
    for number, scale in enumerate(scales):
        part = slice(number * signs.BLOCK, (number + 1) * signs.BLOCK)
        mean = np.abs(whole[part].astype(np.float64)).mean()
        assert scale == pytest.approx(mean, rel=1e-5, abs=1e-44)


@settings(deadline=None)
@given(floats(1e34))
def test_signs_fit_their_payload(x: Floats) -> None:
    payload = OneBit().encode(x.copy(), 0)
    assert len(payload) == 4 * -(-len(x) // 1024) + -(-len(x) // 8)
    out = np.full(len(x), np.nan, np.float32)
    OneBit().decode(payload, out)
    assert np.isfinite(out).all()


@settings(deadline=None)
@given(floats(), st.integers(0, 2**32 - 1))
def test_signs_alone(x: Floats, key: int) -> None:
    bits = check_equal(signs.pack, x, key, np.full(-(-len(x) // 8), 7, np.uint8))[2]
    negative = np.unpackbits(bits, count=len(x), bitorder="little").astype(bool)
    np.testing.assert_array_equal(negative[x != 0], x[x != 0] < 0)


def _mean_within(values: Floats) -> bool:
    """Tell whether as many are 1 as -1, within six standard deviations."""
    assert set(np.unique(values)) == {-1, 1}
    return bool(abs(values.mean()) < 6 / np.sqrt(values.size))


@pytest.mark.parametrize("zero", [0.0, -0.0])
def test_a_zero_has_either_sign(zero: float) -> None:
    """By entry, and by step and rank, which the key stands for; other entries have their own."""
    codec, out = SignSgd(), np.empty((100, 1003), np.float32)
    x = np.full(1003, zero, np.float32)
    x[::3], x[1::3] = 1e-40, -1e-40
    for key, found in enumerate(out):
        codec.decode(codec.encode(x, key), found)
    assert (out[:, ::3] == 1).all()
    assert (out[:, 1::3] == -1).all()
    zeros = out[:, 2::3]
    assert _mean_within(zeros)
    # No entry, and no key, has always the same: 100 tosses, 334 tosses.
    assert abs(zeros.mean(axis=0)).max() < 0.7
    assert abs(zeros.mean(axis=1)).max() < 0.4
    assert abs(np.corrcoef(zeros[:-1].reshape(-1), zeros[1:].reshape(-1))[0, 1]) < 0.05


@pytest.mark.parametrize("size", [2, 4])
def test_a_tie_is_drawn_and_the_ranks_agree(size: int) -> None:
    unit = Unit.single("x", (3, 801))

    def main(comm: Communicator) -> Floats:
        exchange = make_exchange(comm, unit, make("signsgd"))
        buckets = np.full((50, unit.size), 1 if comm.rank % 2 else -1, np.float32)
        for step, bucket in enumerate(buckets):
            exchange.run(bucket, step)
        return buckets

    first, *others = run_threads(size, main)
    for other in others:
        assert_same_bytes(other, first)
    assert _mean_within(first)
    assert abs(first.mean(axis=0)).max() < 0.9


# --- without numba ------------------------------------------------------------------

RUNS: dict[str, Callable[[], Any]] = {
    "bf16": lambda: casts.narrow(np.ones(9, np.float32), BFLOAT16),
    "finite": lambda: checks.is_finite(np.ones(9, np.float32)),
    "signs": lambda: OneBit().encode(np.ones(9, np.float32), 0),
}


def test_without_numba_numpy_does_it_and_one_warning_says_so(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    with_it = {name: run() for name, run in RUNS.items()}
    monkeypatch.setitem(sys.modules, "numba", None)
    compile._numba.cache_clear()
    try:
        for kernel in KERNELS.values():
            # Not looked up yet, as in a process without numba.
            monkeypatch.delitem(vars(kernel), "fastest", raising=False)
        with caplog.at_level(logging.WARNING):
            for name, run in RUNS.items():
                np.testing.assert_array_equal(run(), with_it[name])
        assert not compile.available()
        assert compile.compiled(lambda: None) is None
        assert all(kernel.fastest is kernel.reference for kernel in KERNELS.values())
    finally:
        compile._numba.cache_clear()
        for kernel in KERNELS.values():
            vars(kernel).pop("fastest", None)
        monkeypatch.undo()
    (record,) = caplog.records
    assert "hpc_dl[kernels]" in record.getMessage()
    assert record.levelno == logging.WARNING


def test_the_package_loads_without_numba() -> None:
    code = (
        "import sys; sys.modules['numba'] = None\n"
        "import numpy as np\n"
        "from hpc_dl.compress import names, make\n"
        "for name in names():\n"
        "    make(name)\n"
        "from hpc_dl.compress.kernels.casts import BFLOAT16, narrow\n"
        "print(narrow(np.ones(3, np.float32), BFLOAT16).astype(float).tolist())\n"
        "print(narrow(np.ones(2, np.float32), BFLOAT16).astype(float).tolist())\n"
    )
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code],
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    assert done.stdout.splitlines() == ["[1.0, 1.0, 1.0]", "[1.0, 1.0]"]
    assert done.stderr.count("hpc_dl[kernels]") == 1
