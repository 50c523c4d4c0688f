"""What comes out: nothing is lost, estimates are as good as claimed, bytes as in theory."""

import numpy as np
import pytest

from hpc_dl.compress import AllReduced, Codec, Scheme, Sparsifier, Unit, error_feedback
from hpc_dl.reduce.exchange.gather import DENSE_ABOVE
from hpc_dl.reduce.traffic import bytes_of_allreduce
from hpc_dl.testing.compression.suite import (
    Claims,
    Suite,
    assert_nothing_lost,
    assert_same_everywhere,
    noise,
    run_steps,
    unit_for,
)

#: Repetitions of which the mean is taken.
REPEATED = 150


class EstimatesConformance(Suite):
    """Averages, through the engine."""

    def test_error_feedback_loses_nothing(
        self, scheme: Scheme, claims: Claims, steps: range
    ) -> None:
        """The sum of what came out and of what is owed is the sum of the mean gradients."""
        if scheme.residual == "off" or not claims.telescopes:
            pytest.skip("nothing is kept, or it decays")
        for size in self.sizes:
            traces = run_steps(scheme, size, noise(), steps)
            assert_same_everywhere(traces)
            assert_nothing_lost(scheme, claims, traces)

    def test_error_is_as_small_as_claimed(
        self, scheme: Scheme, claims: Claims, steps: range
    ) -> None:
        if claims.error is None:
            pytest.skip("no bound is claimed")
        bare = error_feedback(scheme, "off")
        for size in self.sizes:
            traces = run_steps(bare, size, noise(), steps)
            for i in range(len(steps)):
                given = [t.given[i].astype(np.float64) for t in traces]
                error = np.linalg.norm(traces[0].outs[i] - np.mean(given, axis=0))
                assert error <= claims.error * np.mean([np.linalg.norm(g) for g in given])

    def test_mean_of_many_is_the_gradient(
        self, scheme: Scheme, claims: Claims, steps: range
    ) -> None:
        """The error must shrink as that of independent draws does, in size and direction."""
        if not claims.unbiased:
            pytest.skip("not claimed to be unbiased")
        unit = unit_for((17, 13), (5,))
        gradient = noise(unit)
        numbers = range(steps[0], steps[0] + REPEATED)
        for size in (1, 2):
            traces = run_steps(
                error_feedback(scheme, "off"), size, lambda r, _: gradient(r, 0), numbers, unit
            )
            true = np.mean([gradient(r, 0).astype(np.float64) for r in range(size)], axis=0)
            errors = np.stack(traces[0].outs) - true
            variance = errors.var(axis=0).sum() / REPEATED
            tiny = 1e-12 * np.square(true).sum()
            assert np.square(errors.mean(axis=0)).sum() <= 2 * variance + tiny
            along = errors @ true / np.linalg.norm(true)
            bound = 4 * along.std() / np.sqrt(REPEATED) + np.sqrt(tiny)
            assert abs(along.mean()) <= bound, "biased along the gradient"

    def test_bytes_on_the_wire(self, scheme: Scheme, claims: Claims) -> None:
        """At least 95 % of what is sent is what theory says must be."""
        if not claims.wire_is_known:
            pytest.skip("the data decide on the number of bytes")
        unit = Unit.single("weight", (200, 300))
        first = scheme.warmup + 1000  # behind any ramp
        for size in self.sizes:
            traces = run_steps(scheme, size, noise(unit), range(first, first + 2), unit)
            sent = np.mean([t.sent for t in traces])
            wanted = self.bytes_in_theory(scheme, unit, size)
            assert 0.95 * sent <= wanted
            assert sent >= 0.9 * wanted, "payload_bytes() says more than is sent"

    @staticmethod
    def bytes_in_theory(scheme: Scheme, unit: Unit, size: int) -> float:
        """Return what each of so many ranks sends for a unit."""
        payload = scheme.compressor.payload_bytes(unit, size)
        if isinstance(scheme.compressor, Sparsifier) and size * payload <= (
            DENSE_ABOVE * 8 * unit.size
        ):
            return (size - 1) * payload
        assert isinstance(scheme.compressor, AllReduced | Codec | Sparsifier)
        return bytes_of_allreduce(round(size * payload), size) / size
