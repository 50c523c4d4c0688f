"""Gradients with NaN and infinity: all ranks see it, and the step leaves no trace on any."""

import warnings
from collections.abc import Callable
from typing import ClassVar

import numpy as np
import pytest

from hpc_dl.compress import Floats, Scheme
from hpc_dl.testing.compression.suite import (
    UNIT,
    Gradients,
    Suite,
    Trace,
    assert_same_everywhere,
    constant,
    noise,
    run_steps,
)
from hpc_dl.testing.same import assert_same_bytes

#: In the first parameter, which the first rank sums, and in the last one.
PLACES = (11, UNIT.segments[-1].stop - 1)


def _with(value: float, place: int, culprit: int, bad: int) -> Gradients:
    """Return gradients of which one rank's has a bad value, in one step."""
    good = noise()

    def gradient(rank: int, number: int) -> Floats:
        x = good(rank, number)
        if rank == culprit and number == bad:
            x[place] = value
        return x

    return gradient


def assert_no_trace(with_it: list[Trace], without: list[Trace], at: int) -> None:
    """Fail unless a step, the one ``at`` this place, left no trace on any rank.

    Args:
        with_it, without: what each rank saw with that step, and if it had not been.
    """
    used = np.zeros(UNIT.size, bool)
    for segment in UNIT.segments:
        used[segment.offset : segment.stop] = True
    for seen, wanted in zip(with_it, without, strict=True):
        # NaN between the parameters would stay there, and spoil all steps that follow.
        assert_same_bytes(np.isnan(seen.outs[at]), used, "where the bad step is NaN")
        outs, saved = list(seen.outs), list(seen.saved)
        if at:
            for key, array in saved[at - 1].items():
                assert_same_bytes(saved[at][key], array, f"{key} has changed")
        del outs[at], saved[at]
        assert_same_bytes(outs, wanted.outs)
        for mine, same in zip(saved, wanted.saved, strict=True):
            for key, array in same.items():
                assert_same_bytes(mine[key], array, f"{key} differs afterwards")
        assert_same_bytes(seen.owed, wanted.owed, "flush() differs afterwards")


class NotFiniteConformance(Suite):
    """Through the engine: what is left, momentum and state are as before, on all ranks."""

    sizes: ClassVar[tuple[int, ...]] = (1, 2, 3, 4)

    def check(
        self, scheme: Scheme, steps: range, at: int, gradients: Callable[[int], Gradients]
    ) -> None:
        """Take steps, and the same without the one ``at`` this place, which is bad.

        Args:
            gradients: makes those of a number of ranks.
        """
        others = [number for number in steps if number != steps[at]]
        for size in self.sizes:
            with warnings.catch_warnings():
                warnings.simplefilter("error")
                with_it = run_steps(scheme, size, gradients(size), steps)
            assert_same_everywhere(with_it)
            assert_no_trace(with_it, run_steps(scheme, size, noise(), others), at)

    @pytest.mark.parametrize(("value", "at"), [(np.nan, 0), (np.inf, 1), (-np.inf, 2)])
    @pytest.mark.parametrize("place", PLACES)
    def test_a_step_that_is_not_finite_leaves_no_trace(
        self, scheme: Scheme, steps: range, value: float, at: int, place: int
    ) -> None:
        """Neither on the rank whose gradient it is, nor on those whose gradients are finite."""
        self.check(scheme, steps, at, lambda size: _with(value, place, size - 1, steps[at]))

    def test_nor_does_one_of_the_warmup(self, scheme: Scheme) -> None:
        warming = scheme._replace(warmup=3)
        self.check(warming, range(4), 1, lambda size: _with(np.nan, PLACES[0], 0, 1))

    @pytest.mark.parametrize("value", [3e38, -3e38])
    def test_next_to_infinity(self, scheme: Scheme, steps: range, value: float) -> None:
        """What cannot be summed counts as infinite."""

        def gradients(rank: int, number: int) -> Floats:
            return constant(value)(0, 0) if number == steps[1] else noise()(rank, number)

        self.check(scheme, steps, 1, lambda size: gradients)
