"""The same bytes each time, on all ranks, from every framework; and nothing else is touched."""

import importlib
import random
import sys
from typing import Any

import numpy as np
import pytest

from hpc_dl.arrays import host_view
from hpc_dl.comm import Communicator
from hpc_dl.compress import Scheme
from hpc_dl.reduce.exchange import make_exchange
from hpc_dl.testing import run_threads
from hpc_dl.testing.compression.suite import (
    UNIT,
    Suite,
    assert_same_everywhere,
    noise,
    run_steps,
)
from hpc_dl.testing.same import assert_same_bytes

#: In front of a bucket and behind it.
MARGIN = 16


class SamenessConformance(Suite):
    """Through the engine."""

    def test_same_seed_same_bytes(self, scheme: Scheme, steps: range) -> None:
        for size in self.sizes:
            one, two = (run_steps(scheme, size, noise(), steps, seed=7) for _ in range(2))
            assert_same_everywhere(one)
            for a, b in zip(one, two, strict=True):
                assert_same_bytes(a.outs, b.outs)
                assert a.sent == b.sent
                for key, array in a.saved[-1].items():
                    assert_same_bytes(array, b.saved[-1][key], key)

    @pytest.mark.parametrize("framework", ["torch", "tensorflow"])
    def test_same_bytes_from(self, scheme: Scheme, steps: range, framework: str) -> None:
        pytest.importorskip(framework, reason=f"{framework} is not installed")
        library = sys.modules[framework]

        def tensor(rank: int, number: int) -> Any:
            make = library.from_numpy if framework == "torch" else library.constant
            x = make(noise()(rank, number))
            # As a layer's would be: computed by the framework.
            return host_view(x * 2)

        size = self.sizes[-1]
        plain = run_steps(scheme, size, lambda *a: noise()(*a) * np.float32(2), steps[:2])
        for a, b in zip(plain, run_steps(scheme, size, tensor, steps[:2]), strict=True):
            assert_same_bytes(a.outs, b.outs)

    def test_global_generators_are_left_alone(self, scheme: Scheme, steps: range) -> None:
        try:
            torch = importlib.import_module("torch")
        except ImportError:
            torch = None

        def states() -> list[Any]:
            found = [random.getstate(), repr(np.random.get_state())]
            return found + ([torch.get_rng_state().tolist()] if torch is not None else [])

        before = states()
        run_steps(scheme, self.sizes[-1], noise(), steps)
        assert states() == before

    def test_only_the_bucket_changes(self, scheme: Scheme, steps: range) -> None:
        """It lies in memory that holds other things, too."""

        def main(comm: Communicator) -> None:
            exchange = make_exchange(comm, UNIT, scheme)
            memory = np.full(UNIT.size + 2 * MARGIN, 42, np.float32)
            bucket = memory[MARGIN:-MARGIN]
            for number in steps:
                bucket[:] = noise()(comm.rank, number)
                exchange.run(bucket, number)
                assert (memory[:MARGIN] == 42).all()
                assert (memory[-MARGIN:] == 42).all()
                for array in exchange.state.values():
                    assert not np.shares_memory(array, memory), "state lies in the bucket"

        run_threads(self.sizes[-1], main)
