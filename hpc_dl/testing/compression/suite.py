"""What all suites share: the author's declarations, and steps on several ranks."""

from collections.abc import Callable, Sequence
from typing import Any, ClassVar, NamedTuple, cast

import numpy as np
import pytest

from hpc_dl.arrays import Parameter, plan
from hpc_dl.comm import Communicator
from hpc_dl.compress import Array, Compressor, Floats, Scheme, Sparsifier, Unit, make
from hpc_dl.compress.scheme import scheme_of
from hpc_dl.reduce.compression import unit_of
from hpc_dl.reduce.exchange import make_exchange
from hpc_dl.testing import run_threads
from hpc_dl.testing.same import assert_same_bytes

#: What a residual need not keep: int8 knows nothing so small.
TINY = 1e-32

#: Returns a rank's gradient of a step.
Gradients = Callable[[int, int], Floats]


class Claims(NamedTuple):
    """What a compressor promises beyond the contract, or cannot promise."""

    error: float | None = None
    """Largest error of one step without error feedback, in norms of the ranks' gradients."""
    unbiased: bool = False
    """Whether, without error feedback, the mean of many steps is the gradient."""
    keeps_zeros: bool = True
    """Whether zeros come out as zeros, and what is next to zero as such."""
    telescopes: bool = True
    """Whether all that is not sent is kept: nothing decays."""
    rounding: float = 2.0**-20
    """Relative error of its sums: more than that of float32 where narrower types are summed."""
    largest: float = 1e28
    """Largest magnitude that it can send."""
    wire_is_known: bool = True
    """Whether ``payload_bytes`` holds for any data."""


def unit_for(*shapes: tuple[int, ...]) -> Unit:
    """Return a unit as a bucket's: parameters at aligned places, zeros between them."""
    float32 = np.dtype(np.float32)
    parameters = [Parameter(f"layer{i}.weight", s, float32) for i, s in enumerate(shapes)]
    (bucket,) = plan(parameters, 1 << 40).buckets
    return unit_of(bucket)


#: Matrices and vectors, with padding behind all but one, and a parameter without elements.
UNIT = unit_for((37, 29), (5,), (0, 3), (8, 4, 2), (64, 33))


def noise(unit: Unit = UNIT, scale: float = 1.0, seed: int = 0) -> Gradients:
    """Return normally distributed gradients, of another size for each parameter."""

    def gradient(rank: int, number: int) -> Floats:
        rng = np.random.default_rng([seed, rank, number])
        flat = np.zeros(unit.size, np.float32)
        for index, segment in enumerate(unit.segments):
            values = rng.standard_normal(segment.shape) * (scale * 2.0**-index)
            segment.of(flat)[...] = values
        return flat

    return gradient


def constant(value: float, unit: Unit = UNIT) -> Gradients:
    """Return gradients that are the same everywhere."""

    def gradient(rank: int, number: int) -> Floats:
        flat = np.zeros(unit.size, np.float32)
        for segment in unit.segments:
            segment.of(flat)[...] = value
        return flat

    return gradient


class Trace(NamedTuple):
    """What one rank saw in some steps."""

    outs: list[Floats]
    sent: list[int]
    given: list[Floats]
    """What compression was given: the gradients, after clipping and momentum."""
    saved: list[dict[str, Array]]
    """The exchange's arrays, after each step."""
    owed: Floats
    """What a flush adds to the next gradient."""


def run_steps(
    scheme: Scheme,
    size: int,
    gradients: Gradients,
    numbers: Sequence[int],
    unit: Unit = UNIT,
    seed: int = 0,
    start: Sequence[dict[str, Array]] | None = None,
) -> list[Trace]:
    """Average gradients over ranks, step after step; return what each rank saw.

    Args:
        numbers: of the steps.
        start: each rank's arrays to begin with.
    """

    def main(comm: Communicator) -> Trace:
        exchange = make_exchange(comm, unit, scheme, seed)
        if start is not None:
            exchange.load_arrays(start[comm.rank])
        trace = Trace([], [], [], [], np.zeros(unit.size, np.float32))
        for number in numbers:
            bucket = gradients(comm.rank, number).copy()
            given = bucket.copy()
            if np.isfinite(given).all():
                scheme.compressor.prepare(given, size)
                if exchange.momentum is not None:
                    given += np.float32(scheme.momentum) * exchange.momentum
                if exchange.shared is not None:
                    beta = np.float32(scheme.shared_momentum)
                    given = (1 - beta) * given + beta * exchange.shared
            trace.given.append(given)
            trace.sent.append(exchange.run(bucket, number, watch=number % 2 == 1))
            trace.outs.append(bucket)
            trace.saved.append(exchange.arrays())
        exchange.flush(trace.owed)
        return trace

    return cast(list[Trace], run_threads(size, main))


def assert_same_everywhere(traces: Sequence[Trace]) -> None:
    """Fail unless all ranks got the same bytes in each step."""
    for trace in traces[1:]:
        for number, (out, first) in enumerate(zip(trace.outs, traces[0].outs, strict=True)):
            assert_same_bytes(out, first, f"ranks differ after step {number}")


def assert_nothing_lost(
    scheme: Scheme, claims: Claims, traces: Sequence[Trace], unit: Unit = UNIT
) -> None:
    """Fail unless what came out and what is owed is, together, what was given."""
    came = np.sum([out.astype(np.float64) for out in traces[0].outs], axis=0)
    given = np.mean(
        [np.sum([g.astype(np.float64) for g in t.given], axis=0) for t in traces], axis=0
    )
    size = sum(_norm(x) for t in traces for x in (*t.outs, *t.given, t.owed)) / len(traces)
    bound = claims.rounding * size + _rounded_away(scheme, traces) + TINY
    owed = np.mean([t.owed.astype(np.float64) for t in traces], axis=0)
    assert _norm(came + owed - given) <= bound, "something was lost, or sent twice"
    assert _norm(came + owed_by(scheme, traces, unit) - given) <= bound, (
        "flush() is not what is saved"
    )


def owed_by(scheme: Scheme, traces: Sequence[Trace], unit: Unit) -> Array:
    """Return the mean of the saved residuals, and the sum of those of the summing ranks."""
    last = [t.saved[-1] for t in traces]
    owed = np.mean([s["residual"].astype(np.float64) for s in last], axis=0)
    if "server" in last[0]:
        server = np.asarray(np.sum([s["server"] for s in last], axis=0, dtype=np.float32))
        if isinstance(scheme.compressor, Sparsifier):
            values = np.empty_like(server)
            scheme.compressor.restore(server, values, unit)
            server = values
        owed += server
    return cast(Array, owed)


def _rounded_away(scheme: Scheme, traces: Sequence[Trace]) -> float:
    """Return how much the type of the residuals may have cost, as a norm."""

    def cost(values: Array) -> float:
        if scheme.residual == "bf16":
            return _norm(values) * 2.0**-8
        return float(np.abs(values).max(initial=0) * np.sqrt(values.size) / 250)

    if scheme.residual == "fp32":
        return 0.0
    steps = range(len(traces[0].saved))
    workers = sum(cost(t.saved[i]["residual"]) for t in traces for i in steps) / len(traces)
    servers = sum(
        cost(t.saved[i]["server"]) for t in traces for i in steps if "server" in t.saved[i]
    )
    return float(workers + servers)


def _norm(x: Array) -> float:
    return float(np.linalg.norm(x.astype(np.float64)))


class Suite:
    """The declarations of a compressor's author, and the fixtures that all tests use."""

    sizes: ClassVar[tuple[int, ...]] = (1, 2, 3)
    """Numbers of ranks."""

    @pytest.fixture
    def compression(self) -> Any:
        """Return a spec string, a compressor or a scheme; each class of tests has its own."""
        pytest.fail(
            f"{type(self).__name__} does not say what is to be tested; define a fixture "
            "`compression` in it that returns a spec string, a compressor or a scheme",
            pytrace=False,
        )

    @pytest.fixture
    def claims(self) -> Claims:
        """Return what the compressor promises."""
        return Claims()

    @pytest.fixture
    def scheme(self, compression: Any) -> Scheme:
        """Return what is tested."""
        if isinstance(compression, Compressor | Scheme):
            return scheme_of(compression)
        return make(compression)

    @pytest.fixture
    def steps(self, scheme: Scheme) -> range:
        """Return the numbers of four steps that compress."""
        return range(scheme.warmup, scheme.warmup + 4)
