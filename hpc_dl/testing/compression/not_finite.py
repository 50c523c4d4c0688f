"""Gradients with NaN and infinity: all ranks see it, and none is harmed."""

import warnings

import numpy as np
import pytest

from hpc_dl.compress import Floats, Scheme
from hpc_dl.testing.compression.suite import (
    Claims,
    Gradients,
    Suite,
    assert_same_everywhere,
    constant,
    noise,
    run_steps,
)
from hpc_dl.testing.same import assert_same_bytes


def _with(value: float, culprit: int, at: int) -> Gradients:
    """Return gradients of which one rank's has a bad value, in one step."""
    good = noise()

    def gradient(rank: int, number: int) -> Floats:
        x = good(rank, number)
        if rank == culprit and number == at:
            x[11] = value
        return x

    return gradient


class NotFiniteConformance(Suite):
    """Through the engine; the step in the middle is bad."""

    @pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
    def test_one_rank(self, scheme: Scheme, steps: range, value: float) -> None:
        for size in self.sizes:
            culprit = size - 1
            with warnings.catch_warnings():
                warnings.simplefilter("error")
                traces = run_steps(scheme, size, _with(value, culprit, steps[1]), steps)
            assert_same_everywhere(traces)
            for number, out in enumerate(traces[0].outs):
                assert np.isfinite(out).all() == (number != 1)
            for trace in traces:
                for saved in trace.saved:
                    assert all(np.isfinite(array).all() for array in saved.values())
            before, after = traces[culprit].saved[:2]
            for key, array in before.items():
                assert_same_bytes(array, after[key], f"{key} has changed")

    def test_alone_it_is_as_if_the_step_had_not_been(self, scheme: Scheme, steps: range) -> None:
        first, bad, *others = steps
        with_it = run_steps(scheme, 1, _with(np.nan, 0, bad), steps)[0]
        without = run_steps(scheme, 1, noise(), [first, *others])[0]
        for a, b in zip(with_it.outs[2:], without.outs[1:], strict=True):
            assert_same_bytes(a, b)
        for key, array in without.saved[-1].items():
            assert_same_bytes(array, with_it.saved[-1][key])

    def test_the_others_keep_what_they_owed(
        self, scheme: Scheme, claims: Claims, steps: range
    ) -> None:
        """Each entry of a residual is what it was, perhaps with the gradient of that step."""
        if scheme.residual == "off" or not claims.telescopes:
            pytest.skip("nothing is kept, or it decays")
        for size in self.sizes[1:]:
            for trace in run_steps(scheme, size, _with(np.nan, 0, steps[1]), steps[:2])[1:]:
                before, after = (saved["residual"] for saved in trace.saved)
                step = {"fp32": 1e-5, "bf16": 2.0**-7, "int8": 2.0**-5}[scheme.residual]
                atol = step * max(1e-6, float(np.abs(trace.given[1]).max() + np.abs(before).max()))
                kept = np.abs(after - before) <= atol
                assert (kept | (np.abs(after - before - trace.given[1]) <= atol)).all()

    @pytest.mark.parametrize("value", [3e38, -3e38])
    def test_next_to_infinity(self, scheme: Scheme, steps: range, value: float) -> None:
        """What cannot be summed counts as infinite, and leaves no trace either."""

        def gradients(rank: int, number: int) -> Floats:
            return constant(value)(0, 0) if number == steps[1] else noise()(rank, number)

        for size in self.sizes:
            with warnings.catch_warnings():
                warnings.simplefilter("error")
                traces = run_steps(scheme, size, gradients, steps)
            assert_same_everywhere(traces)
            for number in (0, 2, 3):
                assert np.isfinite(traces[0].outs[number]).all()
            for trace in traces:
                assert all(np.isfinite(array).all() for array in trace.saved[-1].values())
