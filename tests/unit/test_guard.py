"""The replica guard: equal replicas pass, one flipped bit does not."""

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hpc_dl.comm import Communicator
from hpc_dl.errors import ReplicaDivergenceError
from hpc_dl.reduce import ReplicaGuard
from hpc_dl.reduce.guard import check_replicas, is_due
from hpc_dl.testing import run_threads

pytestmark = pytest.mark.timeout(60)


def _model() -> dict[str, Any]:
    rng = np.random.default_rng(0)
    return {
        "weight": rng.standard_normal((40, 30)).astype(np.float32),
        "bias": np.zeros(30, np.float32),
        "empty": np.zeros((0, 3), np.float32),
        "steps": np.array(7, np.int64),
        "half": rng.standard_normal(9).astype("bfloat16"),
        "strided": rng.standard_normal((6, 8))[:, ::2],
    }


def test_equal_replicas_pass() -> None:
    run_threads(3, lambda comm: check_replicas(comm, _model().items(), when=1))


@settings(max_examples=30, deadline=None)
@given(
    size=st.integers(2, 4),
    name=st.sampled_from([name for name in _model() if name != "empty"]),
    data=st.data(),
)
def test_a_flipped_bit_is_found_and_named(size: int, name: str, data: st.DataObject) -> None:
    rank = data.draw(st.integers(0, size - 1))
    nbytes = _model()[name].nbytes
    bit = data.draw(st.integers(0, 8 * nbytes - 1))

    def main(comm: Communicator) -> str:
        model = _model()
        if comm.rank == rank:
            raw = np.ascontiguousarray(model[name])
            raw.reshape(-1).view(np.uint8)[bit // 8] ^= 1 << bit % 8
            model[name] = raw
        with pytest.raises(ReplicaDivergenceError) as raised:
            check_replicas(comm, model.items(), when=10)
        return str(raised.value)

    ranks = ", ".join(str(r) for r in range(1, size)) if rank == 0 else str(rank)
    for message in run_threads(size, main):
        assert message.startswith(
            f"after step 10 the replicas differ: 1 of 6 parameters, first {name!r}, on rank(s) "
            f"{ranks} against rank 0."
        )
        assert "guard=False" in message


def test_several_differences_name_the_first() -> None:
    def main(comm: Communicator) -> None:
        model = _model()
        if comm.rank > 0:
            model["steps"] += 1
            model["bias"] += 1
        with pytest.raises(ReplicaDivergenceError, match=r"2 of 6 parameters, first 'bias'"):
            check_replicas(comm, model.items(), when=1)

    run_threads(2, main)


def test_zeros_of_both_signs_differ() -> None:
    """Equal as numbers, but not in what a division makes of them."""

    def main(comm: Communicator) -> None:
        x = np.zeros(3, np.float32) * (-1 if comm.rank else 1)
        with pytest.raises(ReplicaDivergenceError):
            check_replicas(comm, [("x", x)], when=1)

    run_threads(2, main)


def test_schedule() -> None:
    due = [step for step in range(5001) if is_due(step)]
    assert due == [1, 2, 10, 100, 1000, 2000, 3000, 4000, 5000]


@pytest.mark.parametrize(
    ("size", "enabled", "present", "compared"),
    [(2, True, True, 3), (2, False, True, 0), (1, True, True, 0), (2, True, False, 0)],
    ids=["on", "off", "alone", "some have joined"],
)
def test_compares_when_due_and_only_then(
    size: int, enabled: bool, present: bool, compared: int
) -> None:
    def main(comm: Communicator) -> int:
        looked = []

        def named() -> Iterator[tuple[str, Any]]:
            looked.append(1)
            yield from _model().items()

        guard = ReplicaGuard(comm, named, enabled, all_present=lambda: present)
        for _ in range(12):
            guard.after_step()
        return len(looked)

    assert run_threads(size, main) == [compared] * size


def test_steps_may_be_counted_elsewhere() -> None:
    def main(comm: Communicator) -> int:
        steps = iter([9, 10, 11])
        guard = ReplicaGuard(
            comm, lambda: [("x", np.full(1, comm.rank))], count=lambda: next(steps)
        )
        guard.after_step()
        with pytest.raises(ReplicaDivergenceError, match="after step 10"):
            guard.after_step()
        guard.after_step()
        return next(steps, -1)

    assert run_threads(2, main) == [-1, -1]
