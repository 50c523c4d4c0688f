"""The cost model predicts what the engine does; measuring gives all ranks the same figures."""

import itertools
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hpc_dl.comm import Communicator
from hpc_dl.compress import Scheme, Unit, make
from hpc_dl.compress.registry import BUILT_IN
from hpc_dl.reduce import measure
from hpc_dl.reduce.cost import (
    Kernel,
    Line,
    Load,
    Network,
    Prediction,
    best,
    network_of_link,
    predict,
)
from hpc_dl.reduce.exchange import make_exchange
from hpc_dl.reduce.measure import measure_kernel, measure_network
from hpc_dl.testing import run_threads

pytestmark = pytest.mark.timeout(120)

FREE = Kernel(0.0, 0.0)
#: 48 blocks of 1024 values: shards of 2, 3 or 4 ranks are whole blocks.
UNIT = Unit.single("w", (256, 192))
FIXED = sorted(name for name in BUILT_IN if getattr(make(name).compressor, "fixed", True))
SPECS = [*FIXED, "topk:ratio=0.3", "int8:error_feedback=fp32", "bf16:error_feedback=int8"]

RANKS = st.integers(2, 300)
SCHEMES = st.sampled_from([make(spec) for spec in SPECS])
SECONDS = st.floats(0, 10)
KERNELS = st.builds(Kernel, st.floats(0, 1e-7), st.floats(0, 1e-7))


@st.composite
def loads(draw: st.DrawFn) -> Load:
    units = draw(st.lists(st.sampled_from([UNIT, Unit.single("v", (64, 64))]), max_size=5))
    compute = draw(SECONDS)
    backward = compute * draw(st.floats(0, 1))
    return Load(tuple(units), compute, backward, spare_core=draw(st.booleans()))


# --- prediction ---------------------------------------------------------------------


@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize("size", [1, 2, 3, 4])
def test_bytes_are_those_that_the_engine_counts(spec: str, size: int) -> None:
    scheme = make(spec)

    def main(comm: Communicator) -> int:
        gradient = np.random.default_rng(comm.rank).standard_normal(UNIT.size, np.float32)
        return make_exchange(comm, UNIT, scheme).run(gradient, 0)

    sent = run_threads(size, main)
    predicted = predict(scheme, Load((UNIT,), 1, 1), network_of_link(size, 1e9, 0), FREE).sent
    # Each message of selected entries begins with their number; a ring's share is rounded down.
    small = 4 * 2 * (size - 1)
    for mine in sent:
        # In two phases, what a rank selects of its own shard is not sent.
        uneven = 0.05 * predicted if spec == "topk:ratio=0.3" else 0
        assert mine == pytest.approx(predicted, abs=small + uneven)


@settings(deadline=None)
@given(SCHEMES, loads(), KERNELS, RANKS, st.floats(1e5, 1e12), st.floats(1, 1e4), st.floats(0, 1))
def test_more_bandwidth_or_less_latency_never_makes_a_step_slower(
    scheme: Scheme,
    load: Load,
    kernel: Kernel,
    ranks: int,
    bandwidth: float,
    faster: float,
    latency: float,
) -> None:
    before = predict(scheme, load, network_of_link(ranks, bandwidth, latency), kernel)
    wider = network_of_link(ranks, bandwidth * faster, latency)
    nearer = network_of_link(ranks, bandwidth, latency / faster)
    for network in (wider, nearer):
        after = predict(scheme, load, network, kernel)
        assert after.step <= before.step * (1 + 1e-9)
        assert after.sent == before.sent


@settings(deadline=None)
@given(loads(), RANKS)
def test_on_an_infinite_network_all_cost_the_same(load: Load, ranks: int) -> None:
    network = network_of_link(ranks, float("inf"), 0.0)
    for spec in SPECS:
        assert predict(make(spec), load, network, FREE).step == load.compute


@settings(deadline=None)
@given(SCHEMES, loads(), KERNELS, RANKS, st.floats(1e5, 1e12))
def test_a_step_takes_no_less_than_its_parts_and_no_more_than_all_of_them(
    scheme: Scheme, load: Load, kernel: Kernel, ranks: int, bandwidth: float
) -> None:
    network = network_of_link(ranks, bandwidth, 1e-5)
    found = predict(scheme, load, network, kernel)
    everything = load.compute + found.network + found.kernels
    assert load.compute <= found.step <= everything * (1 + 1e-9)
    busy = predict(scheme, load._replace(spare_core=False), network, kernel)
    free = predict(scheme, load._replace(spare_core=True), network, kernel)
    assert free.step <= busy.step


def test_with_many_ranks_gathering_ends() -> None:
    """Entries of all ranks would be more than the gradient: they are summed in two phases."""
    scheme, load = make("topk:ratio=0.01"), Load((UNIT,), 0, 0)
    few = predict(scheme, load, network_of_link(8, 1e9, 0), FREE)
    many = predict(scheme, load, network_of_link(512, 1e9, 0), FREE)
    assert few.sent == 7 * 8 * round(0.01 * UNIT.size)
    assert many.sent < 2 * 8 * round(0.01 * UNIT.size)
    assert many.network < few.network


@settings(deadline=None)
@given(
    st.lists(st.integers(90, 110), min_size=1, max_size=8, unique=True),
    st.sampled_from([0, 0.03, 0.1]),
)
def test_the_best_is_the_least_lossy_within_the_gain(steps: list[int], gain: float) -> None:
    found = [Prediction(make("none"), 0, 0, 0, step) for step in steps]
    chosen = next(i for i, p in enumerate(found) if p is best(found, gain))
    assert min(steps) >= steps[chosen] * (1 - gain)
    assert all(min(steps) < step * (1 - gain) for step in steps[:chosen])


def test_small_gains_do_not_add_up() -> None:
    """Each is 2 % faster than the one before, and the last but 2 % than the second."""
    found = [Prediction(make("none"), 0, 0, 0, step) for step in (1.0, 0.98, 0.96)]
    assert best(found, 0.03) is found[1]


# --- measurement --------------------------------------------------------------------


def _check(network: Network, size: int) -> None:
    assert network.size == size
    for line in network[1:]:
        assert isinstance(line, Line)
        assert 0 <= line.start < 10
        assert 0 <= line.rate < 1e-3
        assert line.seconds(1 << 20) >= line.seconds(1 << 10)


@pytest.mark.parametrize("size", [1, 2, 3])
def test_all_ranks_get_the_same_figures(size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measure, "LARGEST", 1 << 18)
    networks = run_threads(size, measure_network)
    assert len(set(networks)) == 1
    _check(networks[0], size)


class Clock:
    """Seconds that pass only in collectives."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.mark.parametrize(("start", "rate"), [(2e-6, 0.0), (1e-4, 1e-9), (5e-3, 1e-6), (0.0, 1e-8)])
def test_measuring_finds_the_line_that_there_is(
    start: float, rate: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where a collective takes microseconds whatever its size."""
    clock = Clock()
    monkeypatch.setattr(measure, "time", SimpleNamespace(perf_counter=clock))

    class Comm:
        rank, size = 0, 1

        def allreduce(self, x: Any, op: Any) -> Any:
            if x.dtype == np.float32:
                clock.now += start + rate * x.nbytes
            return x

        def alltoall(self, parts: list[Any]) -> None:
            clock.now += start + rate * sum(part.nbytes for part in parts)

        def allgather(self, x: Any) -> None:
            clock.now += start + rate * x.nbytes

        def barrier(self) -> None:
            pass

    found = measure_network(Comm())  # type: ignore[arg-type]
    for line in found[1:]:
        assert line.start == pytest.approx(start, abs=1e-9, rel=1e-6)
        assert line.rate == pytest.approx(rate, abs=1e-15, rel=1e-6)


def test_noise_does_not_make_a_line_fall(monkeypatch: pytest.MonkeyPatch) -> None:
    """The small message was slow by chance: more bytes still cost no less."""
    ticks = itertools.chain([0.0, 1e-3] * measure.REPEATS, itertools.cycle([0.0, 1e-5]))
    monkeypatch.setattr(measure, "time", SimpleNamespace(perf_counter=lambda: next(ticks)))
    found = run_threads(1, measure_network)[0]
    _check(found, 1)
    assert found.allreduce == Line(1e-3, 0.0)


@pytest.mark.parametrize("spec", [*BUILT_IN, "topk:error_feedback=off", "int8:error_feedback=bf16"])
def test_kernels_of_each_compressor_are_measured(spec: str) -> None:
    kernel = measure_kernel(make(spec), elements=1 << 12)
    assert kernel.encode >= 0
    assert kernel.decode >= 0
    assert (kernel == FREE) == (spec == "none")


@settings(max_examples=20, deadline=None)
@given(RANKS, st.floats(1e6, 1e11), st.floats(0, 1e-3), st.floats(1, 1e8))
def test_a_link_gives_the_rings_that_are_known(
    ranks: int, bandwidth: float, latency: float, nbytes: float
) -> None:
    """An all-reduce is a reduce-scatter and an all-gather of shards."""
    network = network_of_link(ranks, bandwidth, latency)
    both = network.alltoall.seconds(nbytes) + network.allgather.seconds(nbytes / ranks)
    assert network.allreduce.seconds(nbytes) == pytest.approx(both)
