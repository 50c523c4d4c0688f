"""A step that is not finite leaves no trace on any rank, however it came about."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import numpy as np
import pytest

from hpc_dl.comm import Communicator
from hpc_dl.compress import Array, Bytes, Codec, Floats, Scheme, Unit, make
from hpc_dl.compress.scheme import scheme_of
from hpc_dl.reduce.exchange import make_exchange
from hpc_dl.testing import run_threads
from hpc_dl.testing.same import assert_same_bytes

pytestmark = pytest.mark.timeout(60)

#: A shard for each of three ranks, of blocks of 1024.
UNIT = Unit.single("w", (3, 1024))
LAST = slice(2048, 3072)
BFLOAT16 = make("bf16").compressor.wire_dtype  # type: ignore[attr-defined]
#: As large as counts as finite.
LARGE = np.float32(1.2e30)


class Seen(NamedTuple):
    """What one rank saw."""

    outs: list[Floats]
    saved: list[dict[str, Array]]


def gradient(rank: int, number: int) -> Floats:
    return np.random.default_rng([rank, number]).standard_normal(UNIT.size, np.float32)


def taken(
    scheme: Scheme,
    size: int,
    gradients: Callable[[int, int], Floats],
    numbers: Sequence[int],
    dense: Sequence[int] = (),
) -> list[Seen]:
    """Take steps, some of them suspended (``dense``)."""

    def main(comm: Communicator) -> Seen:
        exchange = make_exchange(comm, UNIT, scheme)
        seen = Seen([], [])
        for number in numbers:
            bucket = gradients(comm.rank, number).copy()
            exchange.run(bucket, number, wire=BFLOAT16 if number in dense else None)
            seen.outs.append(bucket)
            seen.saved.append(exchange.arrays())
        return seen

    return run_threads(size, main)


def assert_as_if_it_had_not_been(with_it: list[Seen], without: list[Seen], at: int) -> None:
    for seen, wanted in zip(with_it, without, strict=True):
        assert np.isnan(seen.outs[at]).all()
        assert_same_bytes(seen.outs[:at] + seen.outs[at + 1 :], wanted.outs)
        for mine, same in zip(seen.saved[:at] + seen.saved[at + 1 :], wanted.saved, strict=True):
            assert mine.keys() == same.keys()
            for key, array in same.items():
                assert_same_bytes(mine[key], array, key)


SPECS = [
    "onebit",
    "onebit:error_feedback=bf16",
    "int4:error_feedback=int8",
    "topk:ratio=0.02",
    "topk:ratio=0.4",
    "threshold:value=1.0",
    "dgc:ratio=0.02,momentum=0.5",
    "topk:ratio=0.4,momentum=0.9",
    "demo:decay=0.9",
    "powersgd:rank=2",
    "fp16:error_feedback=fp32",
    "terngrad:error_feedback=fp32",
]


@pytest.mark.parametrize("size", [1, 2, 3, 4])
@pytest.mark.parametrize("spec", SPECS)
def test_what_is_left_is_as_before(spec: str, size: int) -> None:
    """Also where everything is sent: the guard suspends compression in steps 2 and 3."""

    def gradients(rank: int, number: int) -> Floats:
        x = gradient(rank, number)
        if number in bad and rank == size - 1:
            x[5] = np.nan
        return x

    for at in range(5):
        bad = [at]
        with_it = taken(make(spec), size, gradients, range(5), dense=(2, 3))
        others = [number for number in range(5) if number != at]
        assert_as_if_it_had_not_been(
            with_it, taken(make(spec), size, gradient, others, dense=(2, 3)), at
        )


def test_shared_momentum_is_as_before() -> None:
    scheme = make("onebit:warmup=2")._replace(shared_momentum=0.9)
    for at in range(4):

        def gradients(rank: int, number: int, at: int = at) -> Floats:
            return gradient(rank, number) * np.float32(np.nan if number == at and rank else 1)

        others = [number for number in range(4) if number != at]
        with_it = taken(scheme, 3, gradients, range(4))
        assert_as_if_it_had_not_been(with_it, taken(scheme, 3, gradient, others), at)


# --- gradients that are finite, and a sum or an encoding that is not --------------------


@dataclass(frozen=True)
class Half(Codec):
    """Rounds to float16, in which what is large is infinite."""

    name: ClassVar[str] = "half"
    summary: ClassVar[str] = "float16"
    needs_feedback: ClassVar[bool] = True

    def payload_bytes(self, unit: Unit, size: int) -> float:
        return 2 * unit.size

    def encode(self, x: Floats, key: int) -> Bytes:
        with np.errstate(over="ignore"):
            return x.astype(np.float16).view(np.uint8)

    def decode(self, payload: Bytes, out: Floats) -> None:
        out[:] = payload.view(np.float16)


@pytest.mark.parametrize("culprit", [0, 2])  # sends the last shard, and sums it
@pytest.mark.parametrize("scheme", [scheme_of(Half()), make("fp16:error_feedback=fp32")])
def test_one_shard_that_cannot_be_encoded_spoils_the_step(scheme: Scheme, culprit: int) -> None:
    """And not those that follow: the large values are not kept."""

    def gradients(rank: int, number: int) -> Floats:
        x = gradient(rank, number)
        if number == 1 and rank == culprit:
            x[LAST] = 1e6
        return x

    with_it = taken(scheme, 3, gradients, range(4))
    assert_as_if_it_had_not_been(with_it, taken(scheme, 3, gradient, [0, 2, 3]), 1)


@pytest.mark.parametrize(("ranks", "spec"), [(3, "topk:ratio=0.4"), (2, "topk:ratio=0.02")])
def test_one_shard_whose_sum_is_not_finite_spoils_the_step(ranks: int, spec: str) -> None:
    """What waits and what comes are finite, and together they are not."""

    def gradients(rank: int, number: int) -> Floats:
        x = gradient(rank, number)
        if number < 2:  # more than are selected, so some wait
            x[:] = 0
            x[-2000:] = LARGE
        return x

    for seen in taken(make(spec), ranks, gradients, range(3)):
        assert np.isfinite(seen.outs[0]).all()
        assert np.isnan(seen.outs[1]).all()
        for key, array in seen.saved[0].items():
            assert_same_bytes(seen.saved[1][key], array, key)


def test_what_is_owed_of_sums_is_kept_where_entries_are_gathered_again() -> None:
    """The second stage of a ramp begins with a step that is not finite: sums are still owed."""
    scheme = make("dgc:ratio=0.02,momentum=0,ramp=8")

    def gradients(rank: int, number: int) -> Floats:
        x = gradient(rank, number)
        if number == 2 and rank == 1:
            x[0] = np.inf
        return x

    with_it = taken(scheme, 4, gradients, range(4))
    for seen in with_it:
        assert seen.saved[1]["server"].any()
        assert not seen.saved[3]["server"].any()
    assert_as_if_it_had_not_been(with_it, taken(scheme, 4, gradient, [0, 1, 3]), 2)


@pytest.mark.parametrize("size", [2, 3])
def test_what_is_too_large_spoils_a_dense_step_too(size: int) -> None:
    """Its average may not be: momentum would be taken on the other ranks alone."""
    scheme = make("topk:ratio=0.4,momentum=0.9,warmup=2")

    def gradients(rank: int, number: int) -> Floats:
        if number == 1 and rank == 0:
            return np.full(UNIT.size, np.float32(1.3e30))
        return gradient(rank, number)

    for dense in ((), (4,)):
        numbers, at = [0, 1, 2, 3, 4, 5], 1
        with_it = taken(scheme, size, gradients, numbers, dense)
        without = taken(scheme, size, gradients, [n for n in numbers if n != at], dense)
        assert_as_if_it_had_not_been(with_it, without, at)


def test_health_is_that_of_the_step() -> None:
    def main(comm: Communicator) -> None:
        exchange = make_exchange(comm, UNIT, make("onebit"))
        exchange.run(gradient(comm.rank, 0), 0, watch=True)
        assert exchange.health is not None
        exchange.run(gradient(comm.rank, 1), 1, watch=True, wire=BFLOAT16)
        assert exchange.health is None

    run_threads(2, main)
