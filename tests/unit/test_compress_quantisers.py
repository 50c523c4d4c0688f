"""Quantisers of two phases: compiled and NumPy code agree, bounds hold, nothing overflows."""

from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hpc_dl.compress import Bytes, Codec, Floats, Unit, make
from hpc_dl.compress.kernels import fp8, levels, natural
from hpc_dl.compress.kernels.compile import Kernel
from hpc_dl.compress.qsgd import Qsgd
from hpc_dl.errors import OptionError
from hpc_dl.testing.same import assert_same_bytes

SPECS = [
    "int8",
    "int8:stochastic=true,block=64",
    "int4",
    "int4:stochastic=true,block=256",
    "qsgd",
    "qsgd:bits=2,block=8",
    "qsgd:bits=8",
    "qsgd:norm=l2",
    "qsgd:norm=l2,bits=2,block=64",
    "fp8",
    "fp8:block=24",
    "natural",
]
RANDOM = [spec for spec in SPECS if spec not in ("int8", "int4", "fp8", "fp8:block=24")]
KERNELS = [levels.encode, levels.decode, fp8.encode, fp8.decode, natural.encode, natural.decode]
LARGEST = np.finfo(np.float32).max
LENGTHS = st.one_of(st.integers(1, 40), st.integers(1000, 1050), st.integers(2000, 3500))


def _codec(spec: str) -> Codec:
    codec = make(spec).compressor
    assert isinstance(codec, Codec)
    return codec


def _values(kind: str, length: int, seed: int) -> Floats:
    rng = np.random.default_rng(seed)
    x = rng.standard_normal(length).astype(np.float32)
    match kind:
        case "zero":
            x[:] = 0
        case "minus zero":
            x[:] = -0.0
        case "constant":
            x[:] = x[0]
        case "denormal":
            x *= np.float32(1e-39)
        case "tiny":
            x *= np.float32(1e-36)
        case "far":
            x += np.float32(1e6)
        case "sparse":
            x[rng.random(length) < 0.9] = 0
        case "wide":
            x = np.ldexp(x, rng.integers(-140, 120, length)).astype(np.float32)
        case "huge":
            x = np.where(x < 0, -LARGEST, LARGEST).astype(np.float32)
            x[rng.random(length) < 0.5] *= np.float32(0.9)
    return x


KINDS = [
    "normal",
    "zero",
    "minus zero",
    "constant",
    "denormal",
    "tiny",
    "far",
    "sparse",
    "wide",
    "huge",
]
VALUES = st.builds(_values, st.sampled_from(KINDS), LENGTHS, st.integers(0, 1000))


@contextmanager
def _in_numpy() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        for kernel in KERNELS:
            patch.setitem(vars(kernel), "fastest", kernel.reference)
        yield


def _decoded(codec: Codec, payload: Bytes, length: int) -> Floats:
    out = np.full(length, np.nan, np.float32)
    codec.decode(payload, out)
    return out


def _results(codec: Codec, x: Floats, old: Floats, key: int) -> list[bytes]:
    left, total = old.copy(), old.copy()
    first = codec.encode(x, key)
    second = codec.encode_with_residual(x, left, key)
    codec.decode_add(second, total)
    arrays = [first, second, left, total, _decoded(codec, first, len(x))]
    return [array.tobytes() for array in arrays]


@pytest.mark.parametrize("spec", SPECS)
@given(x=VALUES, key=st.integers(0, 2**32 - 1))
@settings(max_examples=40, deadline=None)
def test_compiled_code_gives_the_bytes_of_numpy(spec: str, x: Floats, key: int) -> None:
    pytest.importorskip("numba")
    # Of the other sign: the sum of the largest numbers stays finite.
    codec, old = _codec(spec), np.copysign(np.roll(x, 1) * np.float32(1e-3), -x)
    with np.errstate(over="ignore"):
        compiled = _results(codec, x, old, key)
        with _in_numpy():
            assert _results(codec, x, old, key) == compiled


@pytest.mark.parametrize("kernel", KERNELS)
def test_both_codes_are_there(kernel: Kernel) -> None:
    pytest.importorskip("numba")
    assert kernel.fastest is not kernel.reference


@pytest.mark.parametrize("spec", SPECS)
@given(x=VALUES, key=st.integers(0, 2**32 - 1))
@settings(max_examples=40, deadline=None)
def test_payload_residual_and_range(spec: str, x: Floats, key: int) -> None:
    codec, before = _codec(spec), x.copy()
    payload = codec.encode(x, key)
    np.testing.assert_array_equal(x, before)
    assert payload.dtype == np.uint8
    assert payload.nbytes == codec.payload_bytes(Unit.single("w", (len(x),)), 4)
    values = _decoded(codec, payload, len(x))
    assert np.isfinite(values).all()

    total = np.ones_like(x)
    codec.decode_add(payload, total)
    np.testing.assert_array_equal(total, 1 + values)

    old = x * np.float32(-0.25)
    left = old.copy()
    second = codec.encode_with_residual(x, left, key)
    np.testing.assert_array_equal(x, before)
    assert_same_bytes(second, codec.encode(x + old, key))
    with np.errstate(over="ignore"):
        expected = (x + old) - _decoded(codec, second, len(x))
    np.testing.assert_array_equal(left, expected)


def _blocks(x: Floats, block: int) -> Iterator[slice]:
    return (slice(start, start + block) for start in range(0, len(x), block))


@pytest.mark.parametrize(("spec", "block"), [(spec, _codec(spec).align) for spec in SPECS[:4]])
@given(x=VALUES, key=st.integers(0, 2**32 - 1))
@settings(max_examples=40, deadline=None)
def test_max_min_is_off_by_a_step_at_most(spec: str, block: int, x: Floats, key: int) -> None:
    codec = _codec(spec)
    values = _decoded(codec, codec.encode(x, key), len(x)).astype(np.float64)
    wide = x.astype(np.float64)
    steps = 255 if spec.startswith("int8") else 15
    for part in _blocks(x, block):
        step = np.ptp(wide[part]) / steps * (1 if "stochastic" in spec else 0.5)
        # Rounding of float32; denormals; and the largest numbers stay below 3.4e38.
        slack = 1e-4 * step + 1e-6 * np.abs(wide[part]).max() + 1e-35
        slack += (LARGEST - 3.4e38) * (np.abs(wide[part]).max() > 3.4e38)
        assert np.abs(values[part] - wide[part]).max() <= step + slack


def _positive(spec: str) -> int:
    """Return qsgd's levels on one side of zero."""
    codec = _codec(spec)
    assert isinstance(codec, Qsgd)
    return int((1 << (codec.bits - 1)) - 1)


@pytest.mark.parametrize("spec", [spec for spec in SPECS if spec.startswith("qsgd")])
@given(x=VALUES, key=st.integers(0, 2**32 - 1))
@settings(max_examples=40, deadline=None)
def test_qsgd_is_off_by_a_step_at_most(spec: str, x: Floats, key: int) -> None:
    codec = _codec(spec)
    values = _decoded(codec, codec.encode(x, key), len(x)).astype(np.float64)
    wide = x.astype(np.float64)
    positive = _positive(spec)
    for part in _blocks(x, codec.align):
        largest = np.abs(wide[part]).max()
        norm = np.sqrt((wide[part] ** 2).sum()) if "l2" in spec else largest
        slack = 1e-4 * norm + 1e-35
        assert np.abs(values[part] - wide[part]).max() <= norm / positive + slack
        assert (values[part] * np.sign(wide[part]) >= 0).all()


@given(x=VALUES)
@settings(max_examples=40, deadline=None)
def test_fp8_is_off_by_half_a_step_at_most(x: Floats) -> None:
    codec = _codec("fp8")
    values = _decoded(codec, codec.encode(x, 0), len(x)).astype(np.float64)
    wide = x.astype(np.float64)
    for part in _blocks(x, codec.align):
        scale = np.abs(wide[part]).max() / 448
        bound = 1.001 * np.maximum(np.abs(wide[part]) / 16, scale * 2**-10) + 5e-35
        assert (np.abs(values[part] - wide[part]) <= bound).all()


@given(x=VALUES, key=st.integers(0, 2**32 - 1))
@settings(max_examples=40, deadline=None)
def test_natural_gives_one_of_the_two_nearest_powers(x: Floats, key: int) -> None:
    codec = _codec("natural")
    values = _decoded(codec, codec.encode(x, key), len(x)).astype(np.float64)
    wide = np.abs(x.astype(np.float64))
    below = 2.0 ** np.floor(np.log2(np.maximum(wide, 1e-300)))
    low = np.where(wide < 2.0**-63, 0, np.minimum(below, 2.0**63))
    high = np.clip(np.where(wide == below, below, 2 * below), 2.0**-63, 2.0**63)
    assert ((np.abs(values) == low) | (np.abs(values) == high)).all()
    assert (values[x == 0] == 0).all()
    assert (values * np.sign(x) >= 0).all()


def _steps(spec: str, x: Floats) -> Floats:
    """Return between which distances each value is rounded."""
    steps, codec = np.abs(x), _codec(spec)
    if spec == "natural":
        return steps
    for part in _blocks(x, codec.align):
        if spec.startswith("int"):
            steps[part] = np.ptp(x[part]) / (255 if spec.startswith("int8") else 15)
        else:
            norm = np.linalg.norm(x[part], 2 if "l2" in spec else np.inf)
            steps[part] = norm / _positive(spec)
    return steps


@pytest.mark.parametrize("spec", RANDOM)
def test_unbiased(spec: str) -> None:
    """Means over many keys are within six standard deviations; the keys are fixed."""
    codec, count = _codec(spec), 2000
    x = np.random.default_rng(1).standard_normal(200).astype(np.float32)
    x[:20] *= np.float32(1e-3)
    x[20:30] = 0
    draws = np.stack([_decoded(codec, codec.encode(x, key), len(x)) for key in range(count)])
    error = draws.mean(axis=0, dtype=np.float64) - x
    # Rounding up or down at random varies by half a step at most; float32 adds its own.
    spread = _steps(spec, x).astype(np.float64) / 2 / np.sqrt(count)
    assert (np.abs(error) <= 6 * spread + 1e-6).all()
    assert abs(error.sum()) <= 6 * np.linalg.norm(spread) + 1e-4
    if not spec.startswith("int"):
        assert not draws[:, 20:30].any()


@pytest.mark.parametrize("spec", RANDOM)
def test_keys_draw_differently(spec: str) -> None:
    codec, x = _codec(spec), _values("normal", 500, 0)
    assert_same_bytes(codec.encode(x, 1), codec.encode(x, 1))
    assert codec.encode(x, 1).tobytes() != codec.encode(x, 2).tobytes()


def test_fp8_rounds_as_ml_dtypes_does() -> None:
    """On a scale of one, for all numbers of 16 bits, and those beside them."""
    whole = (np.arange(1 << 16, dtype=np.uint32) << np.uint32(16))[:, None]
    words = whole + np.array([0, 1, 0x7FFF, 0x8000, 0x8001, 0xFFFF], np.uint32)
    x = words.reshape(-1).view(np.float32)
    x = x[np.abs(x) <= fp8.LARGEST]
    x = np.concatenate([[fp8.LARGEST], x]).astype(np.float32)
    scales, codes = np.empty(1, np.float32), np.empty(len(x), np.uint8)
    fp8.encode(x, x, False, len(x), scales, codes)
    assert scales[0] == 1
    np.testing.assert_array_equal(codes, x.astype(fp8.E4M3).view(np.uint8))


@pytest.mark.parametrize("spec", SPECS)
def test_zeros_stay_zeros(spec: str) -> None:
    codec, x = _codec(spec), np.zeros(1500, np.float32)
    assert not _decoded(codec, codec.encode(x, 3), len(x)).any()


@pytest.mark.parametrize("spec", SPECS[:4])
@pytest.mark.parametrize("value", [0.1, -7.0, 1e30])
def test_max_min_keeps_constants(spec: str, value: float) -> None:
    codec, x = _codec(spec), np.full(1500, value, np.float32)
    np.testing.assert_array_equal(_decoded(codec, codec.encode(x, 3), len(x)), x)


@pytest.mark.parametrize("spec", [spec for spec in SPECS if spec not in RANDOM])
def test_shards_decode_like_the_whole(spec: str) -> None:
    """A shard that begins at a multiple of ``align`` consists of whole blocks."""
    codec = _codec(spec)
    x = _values("normal", 3000, 0)
    cut = 2 * codec.align
    whole = _decoded(codec, codec.encode(x, 0), len(x))
    parts = [_decoded(codec, codec.encode(part, 0), len(part)) for part in np.split(x, [cut])]
    np.testing.assert_array_equal(np.concatenate(parts), whole)


def test_who_needs_feedback() -> None:
    wanted = {"int4": "fp32", "int4:stochastic=true": "off", "int8": "off", "qsgd": "off"}
    assert {spec: make(spec).residual for spec in wanted} == wanted


@pytest.mark.parametrize(
    "spec",
    [
        "int8:block=0",
        "int4:block=12",
        "fp8:block=-8",
        "qsgd:bits=3",
        "qsgd:norm=l1",
        "qsgd:block=1",
    ],
)
def test_bad_options(spec: str) -> None:
    with pytest.raises(OptionError, match=spec.partition("=")[2]):
        make(spec)
