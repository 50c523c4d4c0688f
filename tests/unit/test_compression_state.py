"""What compression keeps between steps, by parameter: saved, moved to other buckets and ranks."""

import copy
import itertools
import pickle
from collections.abc import Generator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest

from hpc_dl.arrays import Layout, Parameter, plan
from hpc_dl.comm import Communicator, Op
from hpc_dl.compress import (
    Floats,
    Round,
    Scheme,
    Sparsifier,
    State,
    Step,
    Unit,
    make,
    momentum_correction,
)
from hpc_dl.compress.casts import Float16
from hpc_dl.compress.demo import Demo
from hpc_dl.compress.scheme import scheme_of
from hpc_dl.errors import OptionError
from hpc_dl.reduce import Saved, reshard
from hpc_dl.reduce.compression import BucketCompression, unit_of
from hpc_dl.reduce.exchange import make_exchange
from hpc_dl.testing import run_threads
from hpc_dl.testing.compression.suite import UNIT as GAPPY
from hpc_dl.testing.compression.suite import noise, run_steps
from hpc_dl.testing.same import assert_same_bytes

pytestmark = pytest.mark.timeout(60)

F32 = np.dtype(np.float32)
#: Names of which one ends with another, and shapes that leave gaps.
PARAMETERS = [
    Parameter("w", (37, 29), F32),
    Parameter("a.w", (31, 41), F32),
    Parameter("bias", (7,), F32),
    Parameter("b.a.w", (64, 33), F32),
]
ONE = plan(PARAMETERS, 1 << 30)
SEVERAL = plan(PARAMETERS[::-1], 4 * 37 * 29)
assert (len(ONE.buckets), len(SEVERAL.buckets)) == (1, 4)

SPECS = [
    "onebit",
    "onebit:error_feedback=int8",
    "topk:ratio=0.1,error_feedback=bf16",
    "topk:ratio=0.4,momentum=0.9",
    "powersgd:rank=2",
    "randomk:ratio=0.1",
    "int4",
]


def gradient(name: str, rank: int, step: int) -> Floats:
    size = next(p.size for p in PARAMETERS if p.name == name)
    return np.random.default_rng([len(name), rank, step]).standard_normal(size, np.float32)


class Run:
    """Steps of one rank."""

    def __init__(
        self, comm: Communicator, scheme: Scheme, layout: Layout = ONE, op: Op = Op.AVERAGE
    ):
        self.comm, self.layout = comm, layout
        self.compression = BucketCompression(comm, layout, [scheme] * len(layout.buckets), op)
        self._buffers = [np.zeros(bucket.size, F32) for bucket in layout.buckets]

    def step(self, number: int, first_rank: int = 0) -> dict[str, Floats]:
        """Average all gradients; return them by name."""
        found = {}
        for index, bucket in enumerate(self.layout.buckets):
            buffer = self._buffers[index]
            places = [
                (p.name, slice(o, o + p.size))
                for p, o in zip(bucket.parameters, bucket.offsets, strict=True)
            ]
            for name, place in places:
                buffer[place] = gradient(name, self.comm.rank + first_rank, number)
            self.compression.run(index, buffer)
            found |= {name: buffer[place].copy() for name, place in places}
        return found


def saved_after(scheme: Scheme, size: int, steps: int, layout: Layout = ONE) -> list[Saved]:
    """Return each rank's state after some steps."""

    def main(comm: Communicator) -> Saved:
        run = Run(comm, scheme, layout)
        for step in range(steps):
            run.step(step)
        return run.compression.state_dict()

    return run_threads(size, main)


def same(one: Saved, two: Saved) -> bool:
    flat = [
        {(name, key): (a.dtype, a.tobytes()) for name, s in saved.items() for key, a in s.items()}
        for saved in (one, two)
    ]
    return flat[0] == flat[1]


def owed(saved: Sequence[Saved], name: str, key: str) -> Any:
    return np.stack([rank[name][key].astype(np.float64) for rank in saved])


@pytest.mark.parametrize("size", [1, 2, 3])
@pytest.mark.parametrize("spec", SPECS)
def test_goes_on_as_if_never_stopped(spec: str, size: int) -> None:
    def main(comm: Communicator) -> None:
        one, two = Run(comm, make(spec)), Run(comm, make(spec))
        for step in range(3):
            one.step(step)
        two.compression.load_state_dict(pickle.loads(pickle.dumps(one.compression.state_dict())))
        assert same(one.compression.state_dict(), two.compression.state_dict())
        for step in range(3, 6):
            a, b = one.step(step), two.step(step)
            for name in a:
                assert_same_bytes(a[name], b[name], f"{name} after step {step}")
        assert same(one.compression.state_dict(), two.compression.state_dict())

    run_threads(size, main)


@pytest.mark.parametrize("spec", SPECS)
def test_state_is_by_parameter(spec: str) -> None:
    scheme = make(spec)
    for saved in saved_after(scheme, 2, 2):
        assert set(saved) == {p.name for p in PARAMETERS}
        for parameter in PARAMETERS:
            kept = saved[parameter.name]
            assert kept["step"] == 2
            assert kept["residual"].shape == (parameter.size,)
            assert ("momentum" in kept) == bool(scheme.momentum)
            low_rank = spec.startswith("powersgd") and len(parameter.shape) == 2
            assert (f"state.q.{parameter.name}" in kept) == low_rank


@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize(("there", "back"), [(ONE, SEVERAL), (SEVERAL, ONE)])
def test_survives_other_buckets(spec: str, there: Layout, back: Layout) -> None:
    """What is owed, the momentum, the step and each parameter's state are the same."""
    states = saved_after(make(spec), 1, 3, there)

    def main(comm: Communicator) -> Saved:
        run = Run(comm, make(spec), back)
        run.compression.load_state_dict(states[0])
        return run.compression.state_dict()

    (moved,) = run_threads(1, main)
    for name in states[0]:
        before = states[0][name]
        own = {k for k in before if not k.startswith("state.") or k == f"state.q.{name}"}
        for key in own:
            a, b = before[key].astype(np.float64), moved[name][key].astype(np.float64)
            # Types of few bits have their scale for each block, which now lies elsewhere.
            step = np.abs(a).max(initial=0) / 120 if "int8" in spec else 0
            np.testing.assert_allclose(b, a, rtol=0, atol=step)


def test_state_of_another_compressor_is_left_out() -> None:
    (saved,) = saved_after(make("powersgd:rank=2"), 1, 2)

    def main(comm: Communicator) -> Saved:
        run = Run(comm, make("topk"))
        run.compression.load_state_dict(saved)
        return run.compression.state_dict()

    (taken,) = run_threads(1, main)
    assert set(taken["w"]) == {"residual", "server", "step", "guard"}
    np.testing.assert_array_equal(taken["w"]["residual"], saved["w"]["residual"])


def test_what_was_saved_is_a_copy() -> None:
    for spec in SPECS:

        def main(comm: Communicator, spec: str = spec) -> None:
            run = Run(comm, make(spec))
            run.step(0)
            saved = run.compression.state_dict()
            before = copy.deepcopy(saved)
            run.step(1)
            assert same(saved, before)
            run.compression.load_state_dict(saved)
            run.step(2)
            assert same(saved, before)

        run_threads(2, main)


@dataclass(frozen=True)
class Counting(Float16):
    """Changes its state in place."""

    def init(self, unit: Unit) -> State:
        return {f"steps.{segment.name}": np.zeros(1) for segment in unit.segments}

    def rounds(
        self, x: Floats, out: Floats, left: Floats | None, state: State, unit: Unit, step: Step
    ) -> Generator[Round, None, None]:
        for counter in state.values():
            counter += 1
        yield from super().rounds(x, out, left, state, unit, step)


def test_what_was_saved_does_not_count_on() -> None:
    def main(comm: Communicator) -> None:
        run = Run(comm, scheme_of(Counting()))
        run.step(0)
        saved = run.compression.state_dict()
        run.step(1)
        assert saved["w"]["state.steps.w"].tolist() == [1]
        run.compression.load_state_dict(saved)
        run.step(2)
        assert saved["w"]["state.steps.w"].tolist() == [1]
        assert run.compression.state_dict()["w"]["state.steps.w"].tolist() == [2]

    run_threads(2, main)


def test_nothing_saved_changes_nothing() -> None:
    def main(comm: Communicator) -> None:
        run = Run(comm, make("onebit"))
        run.step(0)
        before = run.compression.state_dict()
        run.compression.load_state_dict({})
        assert same(before, run.compression.state_dict())

    run_threads(2, main)
    assert reshard([]) == {}


# --- other numbers of ranks -------------------------------------------------------------


@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize(("old", "new"), [(3, 2), (2, 3), (1, 3), (3, 1), (2, 2)])
def test_reshard_keeps_what_is_owed(spec: str, old: int, new: int) -> None:
    """The mean of the residuals, and the sum of those of the summing ranks."""
    scheme = make(spec)
    states = saved_after(scheme, old, 3)
    before = copy.deepcopy(states)
    merged = reshard(states)
    assert all(same(a, b) for a, b in zip(states, before, strict=True))

    def main(comm: Communicator) -> Saved:
        run = Run(comm, scheme)
        run.compression.load_state_dict(merged)
        return run.compression.state_dict()

    taken = run_threads(new, main)
    for parameter in PARAMETERS:
        name = parameter.name
        for rank in taken:
            assert rank[name]["step"] == 3
        for key, combine in (("residual", np.mean), ("momentum", np.mean), ("server", np.sum)):
            if key not in states[0][name]:
                continue
            was = combine(owed(states, name, key), axis=0)
            now = combine(owed(taken, name, key), axis=0)
            step = {"fp32": 1e-6, "bf16": 2.0**-8, "int8": 1 / 120}[scheme.residual]
            reach = max(np.abs(rank[n][key]).max() for rank in states for n in rank)
            assert np.abs(now - was).max() <= step * reach * (old if key == "server" else 1)
    assert states[0]["w"]["residual"].any() or states[0]["w"]["server"].any()


def _times(op: Op, size: int) -> int:
    """Return of how many means the ranks' result is made."""
    return size if op is Op.SUM else 1


def owed_of_all(saved: Sequence[Saved], name: str, op: Op) -> Any:
    """Return what is still to come out."""
    mean = owed(saved, name, "residual").mean(axis=0) + owed(saved, name, "server").sum(axis=0)
    return mean * _times(op, len(saved))


@pytest.mark.parametrize("op", [Op.AVERAGE, Op.SUM])
@pytest.mark.parametrize(("old", "new"), [(3, 2), (2, 3), (1, 3), (3, 1)])
def test_a_flush_after_reshard_pays_what_was_owed(old: int, new: int, op: Op) -> None:
    """And of momentum, the ranks together have as much as before."""
    scheme = make("topk:ratio=0.4,momentum=0.9")
    states = saved_after(scheme, old, 3)
    merged = reshard(states, op=op, size=new)

    def main(comm: Communicator) -> dict[str, Floats]:
        exchange = make_exchange(comm, unit_of(ONE.buckets[0]), scheme)
        exchange.factor = np.float32(_times(op, new))
        arrays = exchange.arrays()
        for segment in exchange.unit.segments:
            place, state = slice(segment.offset, segment.stop), merged[segment.name]
            arrays["residual"][place] = state["residual"]
            arrays["server"][place] = exchange.own_part(segment.offset, state["server"])
        exchange.load_arrays(arrays)
        bucket = np.zeros(exchange.unit.size, np.float32)
        exchange.run(bucket, 3, wire=F32)
        return {s.name: bucket[s.offset : s.stop] for s in exchange.unit.segments}

    for paid in run_threads(new, main):
        for name, values in paid.items():
            np.testing.assert_allclose(values, owed_of_all(states, name, op), rtol=0, atol=1e-4)
    for name in merged:
        before = owed(states, name, "momentum").mean(axis=0) * _times(op, old)
        after = merged[name]["momentum"] * _times(op, new)
        np.testing.assert_allclose(after, before, rtol=0, atol=1e-5)


def test_reshard_of_a_sum_must_know_for_how_many_ranks() -> None:
    states = saved_after(make("onebit"), 2, 1)
    with pytest.raises(OptionError, match="2 ranks with op=Sum; give size="):
        reshard(states, op=Op.SUM)


@pytest.mark.parametrize("op", [Op.AVERAGE, Op.SUM])
@pytest.mark.parametrize("spec", ["onebit", "topk:ratio=0.4", "topk:ratio=0.05"])
def test_nothing_is_lost_over_a_change_of_ranks(spec: str, op: Op) -> None:
    """All that came out, and all that is owed in the end, is all that was given."""
    sizes, steps = (3, 2, 1, 3), 3
    total = {p.name: np.zeros(p.size) for p in PARAMETERS}
    states: list[Saved] = []
    numbers = itertools.count()
    for size in sizes:
        merged = reshard(states, op=op, size=size)
        mine = [next(numbers) for _ in range(steps)]

        def main(
            comm: Communicator, merged: Saved = merged, mine: Sequence[int] = mine
        ) -> tuple[list[dict[str, Floats]], Saved]:
            run = Run(comm, make(spec), op=op)
            run.compression.load_state_dict(merged)
            return [run.step(number) for number in mine], run.compression.state_dict()

        found = run_threads(size, main)
        states = [state for _, state in found]
        for number, out in zip(mine, found[0][0], strict=True):
            for name, value in out.items():
                mean = np.mean([gradient(name, r, number) for r in range(size)], axis=0)
                total[name] += mean * _times(op, size) - value
    for name, rest in total.items():
        np.testing.assert_allclose(owed_of_all(states, name, op), rest, rtol=0, atol=1e-3)
        assert np.abs(rest).max() > 0.05


def test_reshard_of_a_transform() -> None:
    """What summing ranks owe of coefficients is added up as coefficients."""
    scheme = momentum_correction(Demo(k=30, decay=1.0), 0)
    assert isinstance(scheme.compressor, Sparsifier)
    states = saved_after(scheme, 3, 2)
    merged = reshard(states)
    for name in merged:
        total = owed(states, name, "server").sum(axis=0)
        np.testing.assert_allclose(merged[name]["server"], total, rtol=0, atol=1e-5)


def test_what_was_owed_of_sums_is_sent_when_entries_are_gathered_again() -> None:
    """DGC's ramp begins with so many entries that ranks sum shards, and ends with few."""
    unit, ranks = Unit.single("x", (60, 80)), 4
    scheme = make("dgc:ratio=0.02,momentum=0,ramp=8")

    def main(comm: Communicator) -> tuple[float, float]:
        exchange = make_exchange(comm, unit, scheme)
        given, came = 0.0, 0.0
        for step in range(400):
            bucket = np.zeros(unit.size, np.float32)
            if step < 4:
                bucket[:] = np.random.default_rng([comm.rank, step]).uniform(0, 1, unit.size)
            given += float(bucket.sum())
            exchange.run(bucket, step)
            came += float(bucket.sum())
        return given, came

    results = run_threads(ranks, main)
    assert results[0][1] == pytest.approx(np.mean([given for given, _ in results]), rel=1e-4)


def test_what_is_loaded_of_sums_is_sent_where_entries_are_gathered() -> None:
    """Also if the state of a run that summed comes after the first steps."""
    scheme, unit = make("topk:ratio=0.02"), Unit.single("x", (60, 80))

    def main(comm: Communicator) -> None:
        exchange = make_exchange(comm, unit, scheme)
        bucket = np.ones(unit.size, np.float32)
        exchange.run(bucket, 0)
        saved = exchange.arrays()
        saved["server"][:] = 1
        exchange.load_arrays(saved)
        exchange.run(bucket, 1)
        assert not exchange.arrays()["server"].any()

    run_threads(3, main)


def test_nothing_is_kept_between_parameters() -> None:
    """It would be sent with the next gradient."""
    scheme = make("onebit:warmup=1")._replace(shared_momentum=0.9)
    used = np.zeros(GAPPY.size, bool)
    for segment in GAPPY.segments:
        used[segment.offset : segment.stop] = True
    for trace in run_steps(scheme, 3, noise(), range(4)):
        for key, array in trace.saved[-1].items():
            assert array.any()
            assert not array[~used].any(), key


def test_the_majority_decides_whoever_sums() -> None:
    """One rank with large values has one vote in every shard, also in its own."""
    unit = Unit.single("x", (3, 800))

    def main(comm: Communicator) -> np.ndarray:
        exchange = make_exchange(comm, unit, make("signsgd"))
        bucket = np.full(unit.size, -100.0 if comm.rank == 0 else 0.001, np.float32)
        exchange.run(bucket, 0)
        return bucket

    for found in run_threads(3, main):
        np.testing.assert_array_equal(found, np.ones(unit.size, np.float32))
