"""The calls of a compressor, one by one: what they return, and what they leave alone."""

import numpy as np
import pytest

from hpc_dl.compress import AllReduced, Codec, Floats, Reduction, Scheme, Sparsifier, Step, Unit
from hpc_dl.testing.compression.suite import UNIT, Claims, Suite, noise
from hpc_dl.testing.same import assert_same_bytes

LENGTHS = (1, 7, 8, 1000, 1025, 3001)
STEP = Step(5, 0, 1, 0)
#: The signs of three reduction classes that are served by all-reduce.
SUMMED = {Reduction.LINEAR, Reduction.GLOBAL_SCALE, Reduction.MULTI_ROUND}


def _data(length: int) -> tuple[Floats, Floats]:
    rng = np.random.default_rng(length)
    x, left = rng.standard_normal((2, length)).astype(np.float32)
    return x, left


def _data_of(unit: Unit) -> tuple[Floats, Floats]:
    return noise(unit)(0, 0), noise(unit)(1, 0)


def _assert_whole(sent: Floats, left: Floats, whole: Floats, claims: Claims) -> None:
    error = np.linalg.norm((sent.astype(np.float64) + left) - whole)
    assert error <= claims.rounding * (np.linalg.norm(sent) + np.linalg.norm(whole))


class ContractConformance(Suite):
    """``encode``, ``select`` and ``rounds``, called directly."""

    def test_declarations(self, scheme: Scheme) -> None:
        compressor = scheme.compressor
        assert compressor.name
        assert compressor.summary
        assert "\n" not in compressor.summary
        wanted = {
            AllReduced: SUMMED,
            Codec: {Reduction.TWO_PHASE},
            Sparsifier: {Reduction.GATHER},
        }
        (kind,) = [kind for kind in wanted if isinstance(compressor, kind)]
        assert compressor.reduction in wanted[kind]
        assert hash(compressor) == hash(compressor)  # frozen, so schemes can be compared

    def test_payload_is_smaller_than_float32(self, scheme: Scheme) -> None:
        for unit in (UNIT, Unit.single("w", (200, 300))):
            for size in (2, 3, 8):
                assert 0 < scheme.compressor.payload_bytes(unit, size) <= 4 * unit.size
        assert scheme.compressor.payload_bytes(Unit.single("w", (1,)), 2) < 4096

    def test_codec(self, scheme: Scheme, claims: Claims) -> None:
        codec = scheme.compressor
        if not isinstance(codec, Codec):
            pytest.skip("not a Codec")
        for length in LENGTHS:
            x, left = _data(length)
            x_before, left_before = x.copy(), left.copy()
            payload = codec.encode(x, 3)
            assert payload.dtype == np.uint8
            assert payload.ndim == 1
            assert len(payload) == np.ceil(codec.payload_bytes(Unit.single("w", (length,)), 1))
            assert_same_bytes(x, x_before)
            assert_same_bytes(codec.encode(x, 3), payload)
            out, added = np.full(length, np.nan, np.float32), left.copy()
            codec.decode(payload, out)
            codec.decode_add(payload, added)
            np.testing.assert_allclose(added, left + out, 1e-6, 1e-6)

            payload = codec.encode_with_residual(x, left, 3)
            assert len(payload) > 0
            codec.decode(payload, out)
            assert_same_bytes(x, x_before)
            _assert_whole(out, left, x_before + left_before, claims)

    def test_codec_bears_the_largest_numbers(self, scheme: Scheme, claims: Claims) -> None:
        codec = scheme.compressor
        if not isinstance(codec, Codec):
            pytest.skip("not a Codec")
        x, left = _data(3001)
        x *= np.float32(claims.largest / 10)
        left *= np.float32(claims.largest / 10)
        out = np.empty_like(x)
        codec.decode(codec.encode_with_residual(x, left, 3), out)
        assert np.isfinite(out).all()
        assert np.isfinite(left).all()

    def test_sparsifier(self, scheme: Scheme, claims: Claims) -> None:
        chooser = scheme.compressor
        if not isinstance(chooser, Sparsifier):
            pytest.skip("not a Sparsifier")
        for unit in (*(Unit.single("w", (length,)) for length in LENGTHS), UNIT):
            x, left = _data_of(unit)
            x_before, whole = x.copy(), x + left
            for chosen in (
                chooser.select(x, chooser.init(unit), unit, STEP),
                chooser.select_with_residual(x, left, chooser.init(unit), unit, STEP),
            ):
                assert chosen.indices.dtype == np.int32
                assert chosen.values.dtype == np.float32
                assert chosen.indices.shape == chosen.values.shape
                assert (np.diff(chosen.indices) > 0).all()
                assert ((chosen.indices >= 0) & (chosen.indices < unit.size)).all()
                assert_same_bytes(x, x_before)
            if claims.telescopes:
                total, sent = np.zeros_like(whole), np.full_like(whole, np.nan)
                total[chosen.indices] = chosen.values
                chooser.restore(total, sent, unit)
                np.testing.assert_allclose(left + sent, whole, 1e-5, 1e-5)

    def test_rounds(self, scheme: Scheme, claims: Claims) -> None:
        """With one rank, what comes back is what was sent."""
        compressor = scheme.compressor
        if not isinstance(compressor, AllReduced):
            pytest.skip("not AllReduced")
        for unit in (*(Unit.single("w", (length,)) for length in LENGTHS), UNIT):
            x = noise(unit)(0, 0)
            before = x.copy()
            for left in (None, np.full_like(x, np.nan)):
                out = np.full_like(x, np.nan)
                state = compressor.init(unit)
                for wanted in compressor.rounds(x, out, left, state, unit, STEP):
                    assert wanted.op in ("average", "sum", "max")
                    assert wanted.buffer.flags.c_contiguous
                    assert wanted.buffer.flags.writeable
                    assert wanted.buffer.size > 0
                    for mine in (x, out, left):
                        assert mine is None or not np.shares_memory(wanted.buffer, mine)
                assert_same_bytes(x, before)
                assert np.isfinite(out).all()
                if left is not None:
                    for part in unit.segments:
                        _assert_whole(part.of(out), part.of(left), part.of(x), claims)
