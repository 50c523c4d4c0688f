"""Gradients of any length and magnitude."""

import warnings

import numpy as np
import pytest

from hpc_dl.compress import Scheme, Unit
from hpc_dl.testing.compression.suite import (
    UNIT,
    Claims,
    Gradients,
    Suite,
    Trace,
    assert_nothing_lost,
    assert_same_everywhere,
    constant,
    noise,
    run_steps,
)

LENGTHS = (1, 2, 9, 1023, 1025, 2500)
#: What float32 holds with few digits.
DENORMAL = 1e-40


class EdgesConformance(Suite):
    """Through the engine, on one to three ranks."""

    def run(
        self,
        scheme: Scheme,
        claims: Claims,
        size: int,
        gradients: Gradients,
        steps: range,
        unit: Unit = UNIT,
    ) -> list[Trace]:
        """Take steps; all must be finite, the same on all ranks, and lose nothing."""
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            traces = run_steps(scheme, size, gradients, steps, unit)
        assert_same_everywhere(traces)
        for trace in traces:
            for array in (*trace.outs, *(a for saved in trace.saved for a in saved.values())):
                assert np.isfinite(array).all()
        if scheme.residual != "off" and claims.telescopes:
            assert_nothing_lost(scheme, claims, traces, unit)
        return traces

    @pytest.mark.parametrize("length", LENGTHS)
    def test_lengths(self, scheme: Scheme, claims: Claims, steps: range, length: int) -> None:
        """More ranks than elements, and lengths that no block or byte divides."""
        unit = Unit.single("weight", (length,))
        for size in self.sizes if length < 1000 else self.sizes[-1:]:
            self.run(scheme, claims, size, noise(unit), steps[:2], unit)

    def test_no_elements(self, scheme: Scheme, steps: range) -> None:
        for unit in (Unit((), 0), Unit.single("weight", (0, 3))):
            for size in self.sizes:
                for trace in run_steps(scheme, size, noise(unit), steps, unit):
                    assert trace.sent == [0] * len(steps)

    def test_zeros(self, scheme: Scheme, claims: Claims, steps: range) -> None:
        for size in self.sizes:
            (first, *_) = self.run(scheme, claims, size, constant(0), steps[:2])
            for out in first.outs:
                assert not out.any() or not claims.keeps_zeros

    def test_zeros_stay_between_parameters(
        self, scheme: Scheme, claims: Claims, steps: range
    ) -> None:
        """What comes out there would stay in the bucket, and be sent again."""
        used = np.zeros(UNIT.size, bool)
        for segment in UNIT.segments:
            used[segment.offset : segment.stop] = True
        assert not used.all()
        for size in self.sizes:
            for out in self.run(scheme, claims, size, noise(), steps)[0].outs:
                assert not out[~used].any()

    @pytest.mark.parametrize("value", [1.0, -3e-3])
    def test_all_the_same(self, scheme: Scheme, claims: Claims, steps: range, value: float) -> None:
        for size in self.sizes:
            self.run(scheme, claims, size, constant(value), steps[:2])

    def test_denormal(self, scheme: Scheme, claims: Claims, steps: range) -> None:
        for size in self.sizes:
            for gradients in (constant(DENORMAL), noise(scale=DENORMAL)):
                traces = self.run(scheme, claims, size, gradients, steps[:2])
                for out in traces[0].outs if claims.keeps_zeros else ():
                    assert np.abs(out).max() < 1e-15

    def test_large(self, scheme: Scheme, claims: Claims, steps: range) -> None:
        """Sums of squares overflow; what comes out must not."""
        for size in self.sizes:
            self.run(scheme, claims, size, noise(scale=claims.largest / 100), steps[:2])

    def test_large_beside_small(self, scheme: Scheme, claims: Claims, steps: range) -> None:
        def gradients(rank: int, number: int) -> np.ndarray:
            x = noise()(rank, number) * np.float32(1e-20)
            for segment in UNIT.segments:
                x[segment.offset : segment.stop : 97] = min(1e20, claims.largest)
            return x

        for size in self.sizes:
            self.run(scheme, claims, size, gradients, steps[:2])
