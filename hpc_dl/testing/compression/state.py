"""What is kept: it can be copied, saved and taken up again."""

import copy
import pickle

import numpy as np

from hpc_dl.compress import Scheme, make, names
from hpc_dl.testing.compression.suite import UNIT, Suite, noise, run_steps
from hpc_dl.testing.same import assert_same_bytes


class StateConformance(Suite):
    """Compressors, schemes, and the arrays of an exchange."""

    def test_copies_are_equal(self, scheme: Scheme) -> None:
        for again in (pickle.loads(pickle.dumps(scheme)), copy.deepcopy(scheme), copy.copy(scheme)):
            assert again == scheme
            assert hash(again) == hash(scheme)
            assert again.describe() == scheme.describe()

    def test_description_makes_the_same(self, scheme: Scheme) -> None:
        if scheme.name in names():
            assert make(scheme.describe()) == scheme

    def test_state_is_by_parameter(self, scheme: Scheme) -> None:
        """Else it would be lost when buckets are cut elsewhere."""
        one, two = (scheme.compressor.init(UNIT) for _ in range(2))
        known = {segment.name for segment in UNIT.segments}
        for key, array in one.items():
            assert any(key.endswith(f".{name}") for name in known), (
                f"{key!r} must end with a dot and the name of a parameter"
            )
            assert_same_bytes(array, two[key])
            assert not np.shares_memory(array, two[key])

    def test_resumed_is_as_if_never_stopped(self, scheme: Scheme, steps: range) -> None:
        half = len(steps) // 2
        for size in self.sizes:
            through = run_steps(scheme, size, noise(), steps)
            saved = [pickle.loads(pickle.dumps(t.saved[half - 1])) for t in through]
            resumed = run_steps(scheme, size, noise(), steps[half:], start=saved)
            for a, b in zip(through, resumed, strict=True):
                assert_same_bytes(a.outs[half:], b.outs)
                assert a.saved[-1].keys() == b.saved[-1].keys()
                for key, array in a.saved[-1].items():
                    assert_same_bytes(array, b.saved[-1][key], f"{key} differs")

    def test_saved_arrays_are_copies(self, scheme: Scheme, steps: range) -> None:
        """A later step must not change what was saved."""
        one = run_steps(scheme, 2, noise(), steps[:1])
        two = run_steps(scheme, 2, noise(), steps[:3])
        for a, b in zip(one, two, strict=True):
            for key, array in a.saved[0].items():
                assert_same_bytes(array, b.saved[0][key], f"{key} was changed")
