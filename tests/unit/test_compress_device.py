"""Compression of tensors gives the bytes of the host's: on the CPU, and on a GPU, if any."""

import itertools
from typing import Any, NamedTuple, cast

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import hpc_dl.torch as hvd
from hpc_dl.arrays import Layout, Parameter, host_view
from hpc_dl.comm import Communicator, Op
from hpc_dl.compress import (
    Array,
    Codec,
    Floats,
    Scheme,
    Sparsifier,
    Step,
    Unit,
    make,
    only,
    policy_of,
)
from hpc_dl.compress.device import Piece, codec_of, has_kernels, select_of
from hpc_dl.compress.device.codec import quotient, root
from hpc_dl.compress.device.products import DeviceProducts
from hpc_dl.compress.device.residual import make_residual as make_device_residual
from hpc_dl.compress.products import Products
from hpc_dl.compress.residual import make_residual
from hpc_dl.compress.scheme import warmup
from hpc_dl.reduce import Saved, make_reducer
from hpc_dl.reduce.exchange import make_exchange
from hpc_dl.reduce.reducer import load_state, state_of
from hpc_dl.testing import run_threads
from hpc_dl.testing.compression.suite import UNIT, noise, unit_for
from hpc_dl.testing.same import assert_same_bytes

pytestmark = pytest.mark.timeout(120)

CODECS = [
    "onebit",
    "signsgd:scale=0.1",
    "int8",
    "int8:stochastic=true,block=64",
    "int4",
    "int4:stochastic=true,block=256",
    "qsgd",
    "qsgd:bits=2,block=8",
    "qsgd:bits=8",
    "qsgd:norm=l2",
    "qsgd:norm=l2,bits=2,block=24",
    "fp8",
    "fp8:block=24",
    "natural",
]
SPARSIFIERS = ["topk", "topk:ratio=0.2", "topk:sample=false", "dgc:ratio=0.02", "threshold:value=1"]
CASTS = ["fp16:error_feedback=fp32", "bf16:error_feedback=fp32"]
#: Rounded otherwise than on the host, but the same on all ranks.
LOW_RANK = ["powersgd:rank=2", "powersgd:rank=3,iterations=2,warm_start=false"]
#: What has no kernels for tensors goes over the host.
OTHERS = ["sketch", "demo", "randomk", "terngrad", "dgc:clip=1.0"]

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")
DEVICES = [
    "cpu",
    pytest.param("cuda", marks=needs_gpu),
]
LENGTHS = st.one_of(st.integers(1, 40), st.integers(1000, 1050), st.integers(2000, 3500))


@pytest.fixture(params=DEVICES)
def device(request: pytest.FixtureRequest) -> torch.device:
    return torch.device(request.param)


def _tensor(x: Floats, device: torch.device) -> torch.Tensor:
    return torch.from_numpy(x.copy()).to(device)


def _bytes(x: Any) -> bytes:
    values: Array = np.asarray(x.cpu() if isinstance(x, torch.Tensor) else x)
    return values.tobytes()


def _floats(length: int, kind: str, seed: int) -> Floats:
    """Return finite values: of all sizes, with zeros of both signs, equal ones, or denormals."""
    rng = np.random.default_rng(seed)
    x = rng.standard_normal(length).astype(np.float32)
    if kind == "wide":
        x *= np.float32(2.0) ** rng.integers(-149, 97, length).astype(np.float32)
    elif kind == "large":
        x = np.clip(x, -3, 3) * np.float32(1e38)
    elif kind == "denormal":
        x *= np.float32(1e-42)
    elif kind == "few":
        x = np.round(x).astype(np.float32)  # with -0.0 among them
    elif kind == "zeros":
        x = np.where(x < 0, np.float32(-0.0), np.float32(0))
    elif kind == "blocks":
        x *= np.float32(10.0) ** (-(np.arange(length) // 8) % 37).astype(np.float32)
        x[rng.random(length) < 0.5] = 0
    return x


KINDS = st.sampled_from(["normal", "wide", "large", "denormal", "few", "zeros", "blocks"])


def _codec(spec: str) -> Codec:
    codec = make(spec).compressor
    assert isinstance(codec, Codec)
    return codec


@pytest.mark.parametrize("spec", CODECS)
@settings(max_examples=25, deadline=None)
@given(data=st.data())
def test_codecs_give_the_same_bytes(spec: str, data: st.DataObject) -> None:
    codec = _codec(spec)
    kernels = codec_of(codec)
    assert kernels is not None
    assert codec.align % kernels.block == 0
    for name in ("cpu", "cuda") if torch.cuda.is_available() else ("cpu",):
        device = torch.device(name)
        length, seed = data.draw(LENGTHS), data.draw(st.integers(0, 2**31))
        x = _floats(length, data.draw(KINDS), seed)
        key = data.draw(st.integers(0, 2**32 - 1))
        before = _tensor(x, device)
        given_x = before.clone()
        payload = codec.encode(x, key)
        (got,) = kernels.encode(given_x, None, [Piece(0, length, key)])
        assert_same_bytes(got, payload)
        assert torch.equal(given_x.view(torch.int32), before.view(torch.int32))

        left = _floats(length, data.draw(KINDS), seed + 1) * np.float32(0.1)
        other = _tensor(left, device)
        payload = codec.encode_with_residual(x, left, key)
        (got,) = kernels.encode(given_x, other, [Piece(0, length, key)])
        assert_same_bytes(got, payload)
        assert_same_bytes(_bytes(other), left)

        out, added = np.empty_like(x), left.copy()
        on_device = torch.empty_like(given_x)
        codec.decode(payload, out)
        codec.decode_add(payload, added)
        kernels.decode([payload], [length], on_device, add=False)
        kernels.decode([payload], [length], other, add=True)
        assert_same_bytes(_bytes(on_device), out)
        assert_same_bytes(_bytes(other), added)


@pytest.mark.parametrize("spec", CODECS)
@pytest.mark.parametrize("stop", [1, 5000, 4096])
def test_pieces_are_encoded_as_if_alone(spec: str, stop: int, device: torch.device) -> None:
    codec = _codec(spec)
    kernels = codec_of(codec)
    assert kernels is not None
    step = codec.align * max(1, 1024 // codec.align)
    bounds = [*range(0, stop, step), stop]
    pieces = [Piece(a, b, 7 * i + 2**31) for i, (a, b) in enumerate(itertools.pairwise(bounds))]
    x, left = _floats(stop, "normal", 0), _floats(stop, "normal", 1)
    rest = _tensor(left, device)
    payloads = kernels.encode(_tensor(x, device), rest, pieces)
    for piece, payload in zip(pieces, payloads, strict=True):
        part = slice(piece.start, piece.stop)
        wanted = codec.encode_with_residual(x[part], left[part], piece.key)
        assert_same_bytes(payload, wanted)
    assert_same_bytes(_bytes(rest), left)
    out = torch.empty(stop, device=device)
    kernels.decode(payloads, [p.stop - p.start for p in pieces], out, add=False)
    for piece, payload in zip(pieces, payloads, strict=True):
        wanted_out = np.empty(piece.stop - piece.start, np.float32)
        codec.decode(payload, wanted_out)
        assert_same_bytes(_bytes(out[piece.start : piece.stop]), wanted_out)


@pytest.mark.parametrize("spec", SPARSIFIERS)
@settings(max_examples=15, deadline=None)
@given(
    # From 65,536 on a sample decides.
    length=st.one_of(LENGTHS, st.integers(65_000, 70_000)),
    kind=KINDS,
    seed=st.integers(0, 2**31),
    number=st.integers(0, 100),
    feedback=st.booleans(),
)
def test_the_same_entries_are_selected(
    spec: str, length: int, kind: str, seed: int, number: int, feedback: bool
) -> None:
    sparsifier = make(spec).compressor
    assert isinstance(sparsifier, Sparsifier)
    select = select_of(sparsifier)
    assert select is not None
    unit, step = Unit.single("w", (length,)), Step(number, 1, 2, seed)
    x = _floats(length, kind, seed)
    for name in ("cpu", "cuda") if torch.cuda.is_available() else ("cpu",):
        device = torch.device(name)
        on_device = _tensor(x, device)
        if feedback:
            left = _floats(length, kind, seed + 1) * np.float32(0.1)
            other = _tensor(left, device)
            wanted = sparsifier.select_with_residual(x, left, {}, unit, step)
            chosen = select(on_device, other, step)
            assert_same_bytes(_bytes(other), left)
        else:
            wanted = sparsifier.select(x, {}, unit, step)
            chosen = select(on_device, None, step)
        assert chosen.indices.dtype == np.int32
        assert_same_bytes(chosen.indices, wanted.indices)
        assert_same_bytes(chosen.values, wanted.values)


@pytest.mark.parametrize("kind", ["fp32", "bf16", "int8"])
@pytest.mark.parametrize("values", ["normal", "wide", "denormal", "few", "blocks"])
@pytest.mark.parametrize("length", [0, 1, 1024, 2500])
def test_residuals_are_kept_alike(
    kind: str, values: str, length: int, device: torch.device
) -> None:
    x = _floats(length, values, length)
    host, other = make_residual(kind, length), make_device_residual(kind, length, device)
    assert host is not None
    assert other is not None
    host.store(x)
    other.store(cast(Any, _tensor(x, device)))
    assert_same_bytes(_bytes(other.load()), host.load())
    assert other.nbytes == host.nbytes
    lent = other.load()
    lent += 1  # it belongs to the caller
    assert_same_bytes(_bytes(other.load()), host.load())


def test_quotients_and_roots_are_rounded_once(device: torch.device) -> None:
    x = np.random.default_rng(0).standard_normal(100_000).astype(np.float32)
    on_device = _tensor(x, device)
    for divisor in (3.0, 7.5, 127.0, 448.0):
        wanted = x / np.float32(divisor)
        assert_same_bytes(_bytes(quotient(on_device, divisor)), wanted)
    assert_same_bytes(_bytes(quotient(1.0, on_device)), np.float32(1) / x)
    assert_same_bytes(_bytes(root(on_device.abs())), np.sqrt(np.abs(x)))


def test_what_has_kernels() -> None:
    for spec in CODECS + SPARSIFIERS + CASTS + LOW_RANK:
        assert has_kernels(make(spec).compressor), spec
    for spec in OTHERS:
        assert not has_kernels(make(spec).compressor), spec


# --- exchanges ------------------------------------------------------------------------


class Seen(NamedTuple):
    """What one rank saw of an exchange."""

    outs: list[bytes]
    sent: list[int]
    saved: list[dict[str, Array]]
    health: list[Any]


EXCHANGED = [
    *CODECS[:5],
    "int8:error_feedback=int8",
    "onebit:error_feedback=bf16",
    "onebit:error_feedback=off",
    "qsgd:norm=l2,block=64",
    "fp8:error_feedback=fp32",
    "natural",
    *SPARSIFIERS[:2],
    "topk:ratio=0.4,momentum=0.9",
    "dgc:ratio=0.02,ramp=4",
    "threshold:value=0.5,error_feedback=int8",
    *CASTS,
    "bf16:error_feedback=int8",
]


def _exchanged(
    scheme: Scheme,
    size: int,
    unit: Unit,
    device: torch.device | None,
    start: list[dict[str, Array]] | None = None,
    broken: frozenset[int] = frozenset(),
    wires: frozenset[int] = frozenset(),
) -> list[Seen]:
    """Take some steps; rank 0's gradient is not finite in the ``broken`` ones."""

    def main(comm: Communicator) -> Seen:
        exchange = make_exchange(comm, unit, scheme, 3, device)
        exchange.factor = np.float32(0.3)
        if start is not None:
            exchange.load_arrays(start[comm.rank])
        seen = Seen([], [], [], [])
        for number in range(5):
            gradient = noise(unit)(comm.rank, number)
            if number in broken and comm.rank == 0:
                gradient[len(gradient) // 2] = np.inf
            bucket: Any = gradient if device is None else _tensor(gradient, device)
            wire = np.dtype(np.float16) if number in wires else None
            seen.sent.append(exchange.run(bucket, number, number % 2 == 0, wire))
            values = np.frombuffer(_bytes(bucket), np.float32)
            # A NaN has many representations; none of them means anything.
            seen.outs.append(np.where(np.isnan(values), np.float32(np.nan), values).tobytes())
            seen.saved.append(exchange.arrays())
            seen.health.append(exchange.health)
        return seen

    return cast(list[Seen], run_threads(size, main))


def _assert_alike(device: list[Seen], host: list[Seen]) -> None:
    for mine, wanted in zip(device, host, strict=True):
        assert mine.outs == wanted.outs
        assert mine.sent == wanted.sent
        for saved, same in zip(mine.saved, wanted.saved, strict=True):
            assert saved.keys() == same.keys()
            for key, value in saved.items():
                assert isinstance(value, np.ndarray)
                assert value.dtype == same[key].dtype
                assert_same_bytes(value, same[key], key)
        for health, like in zip(mine.health, wanted.health, strict=True):
            np.testing.assert_allclose(health or 0, like or 0, rtol=1e-3)


@pytest.mark.parametrize("size", [1, 2, 3])
@pytest.mark.parametrize("spec", EXCHANGED)
def test_exchanges_are_alike(spec: str, size: int, device: torch.device) -> None:
    scheme = make(spec)
    host = _exchanged(scheme, size, UNIT, None)
    _assert_alike(_exchanged(scheme, size, UNIT, device), host)


@pytest.mark.parametrize("spec", ["onebit", "int8", "topk:ratio=0.1", "topk:ratio=0.4", *CASTS])
def test_what_is_not_finite_is_alike(spec: str, device: torch.device) -> None:
    steps = frozenset({0, 2})
    host = _exchanged(make(spec), 3, UNIT, None, broken=steps)
    _assert_alike(_exchanged(make(spec), 3, UNIT, device, broken=steps), host)


@pytest.mark.parametrize("spec", ["onebit", "topk:ratio=0.4", CASTS[0]])
def test_suspension_and_warmup_are_alike(spec: str, device: torch.device) -> None:
    scheme, steps = warmup(make(spec), 1), frozenset({2, 3})
    host = _exchanged(scheme, 2, UNIT, None, wires=steps)
    _assert_alike(_exchanged(scheme, 2, UNIT, device, wires=steps), host)


def test_shared_momentum_is_alike(device: torch.device) -> None:
    scheme = make("onebit:warmup=2")._replace(shared_momentum=0.9)
    host = _exchanged(scheme, 2, UNIT, None)
    assert "shared" in host[0].saved[0]
    _assert_alike(_exchanged(scheme, 2, UNIT, device), host)


@pytest.mark.parametrize("size", [1, 2, 3])
@pytest.mark.parametrize("spec", [*LOW_RANK, "powersgd:error_feedback=int8"])
@pytest.mark.parametrize("events", [(), (2,)])
def test_low_rank_is_the_same_but_for_rounding(
    spec: str, size: int, events: tuple[int, ...], device: torch.device
) -> None:
    """Also where a gradient is not finite, and after a step that sends everything."""
    scheme, broken, wires = make(spec), frozenset(events), frozenset(n + 1 for n in events)
    host = _exchanged(scheme, size, UNIT, None, None, broken, wires)
    there = _exchanged(scheme, size, UNIT, device, None, broken, wires)
    for mine, wanted in zip(there, host, strict=True):
        assert mine.sent == wanted.sent
        assert mine.outs == there[0].outs
        for out, like in zip(mine.outs, wanted.outs, strict=True):
            found, expected = np.frombuffer(out, np.float32), np.frombuffer(like, np.float32)
            np.testing.assert_allclose(found, expected, rtol=1e-3, atol=1e-4)
        for number, (saved, same) in enumerate(zip(mine.saved, wanted.saved, strict=True)):
            assert saved.keys() == same.keys()
            for key, value in saved.items():
                assert value.dtype == same[key].dtype
                atol = 1e-4 if scheme.residual == "fp32" or key != "residual" else 0.05
                np.testing.assert_allclose(value, same[key], rtol=1e-3, atol=atol, err_msg=key)
                if key.startswith("state."):
                    assert_same_bytes(value, there[0].saved[number][key], key)


@pytest.mark.parametrize("shapes", [((1,),), ((0, 3),), ((7,), (1, 1)), ((40, 30),)])
def test_low_rank_of_small_buckets(shapes: tuple[Any, ...], device: torch.device) -> None:
    unit = unit_for(*shapes)
    host = _exchanged(make("powersgd:rank=1"), 3, unit, None)
    there = _exchanged(make("powersgd:rank=1"), 3, unit, device)
    for out, like in zip(there[0].outs, host[0].outs, strict=True):
        found, expected = np.frombuffer(out, np.float32), np.frombuffer(like, np.float32)
        np.testing.assert_allclose(found, expected, rtol=1e-3, atol=1e-4)


@settings(max_examples=20, deadline=None)
@given(rank=st.integers(1, 5), keep=st.booleans(), seed=st.integers(0, 2**31))
def test_products_after_an_average_have_the_same_bytes(rank: int, keep: bool, seed: int) -> None:
    rng = np.random.default_rng(seed)
    height, width = rng.integers(1, 50, 2)
    p, q, x = (
        rng.standard_normal(shape).astype(np.float32)
        for shape in ((rank, height), (rank, width), (height, width))
    )
    out, left = np.empty_like(x), np.empty_like(x) if keep else None
    Products().multiply(p, q, x, out, left)
    for name in ("cpu", "cuda") if torch.cuda.is_available() else ("cpu",):
        device = torch.device(name)
        tensor, rest = torch.empty_like(_tensor(x, device)), _tensor(x, device)
        given = [_tensor(a, device) for a in (p, q, x)]
        DeviceProducts(device).multiply(*given, tensor, rest if keep else None)
        assert_same_bytes(_bytes(tensor), out)
        if left is not None:
            assert_same_bytes(_bytes(rest), left)


@pytest.mark.parametrize("spec", ["onebit:error_feedback=bf16", "topk:ratio=0.4,momentum=0.9"])
def test_state_goes_from_one_to_the_other(spec: str, device: torch.device) -> None:
    scheme = make(spec)
    start = [seen.saved[-1] for seen in _exchanged(scheme, 2, UNIT, device)]
    host = _exchanged(scheme, 2, UNIT, None, start)
    _assert_alike(_exchanged(scheme, 2, UNIT, device, start), host)
    start = [seen.saved[-1] for seen in host]
    _assert_alike(
        _exchanged(scheme, 2, UNIT, device, start), _exchanged(scheme, 2, UNIT, None, start)
    )


@pytest.mark.parametrize("spec", ["onebit", "topk:ratio=0.4", "bf16:error_feedback=fp32"])
def test_small_buckets(spec: str, device: torch.device) -> None:
    for shapes in (((1,),), ((0, 3),), ((7,), (1, 1))):
        unit = unit_for(*shapes)
        host = _exchanged(make(spec), 3, unit, None)
        _assert_alike(_exchanged(make(spec), 3, unit, device), host)


@pytest.mark.parametrize("spec", ["onebit", "powersgd:rank=3,iterations=2"])
def test_ranks_of_both_kinds_work_together(spec: str, device: torch.device) -> None:
    def main(comm: Communicator) -> list[bytes]:
        where = device if comm.rank else None
        exchange = make_exchange(comm, UNIT, make(spec), 0, where)
        outs = []
        for number in range(3):
            gradient = noise()(comm.rank, number)
            bucket: Any = gradient if where is None else _tensor(gradient, where)
            exchange.run(bucket, number)
            outs.append(_bytes(bucket))
        return outs

    first, second = cast(list[list[bytes]], run_threads(2, main))
    assert first == second


def test_a_bucket_on_the_cpu_is_worked_on_in_place() -> None:
    def main(comm: Communicator) -> None:
        exchange = make_exchange(comm, UNIT, make("onebit"), 0, torch.device("cpu"))
        bucket = torch.from_numpy(noise()(comm.rank, 0))
        before = host_view(bucket)
        exchange.run(cast(Any, bucket), 0)
        assert np.shares_memory(before, host_view(bucket))

    run_threads(2, main)


# --- reducers and optimizers ----------------------------------------------------------

F32 = np.dtype(np.float32)
PARAMETERS = [
    Parameter("a", (37, 29), F32),
    Parameter("b", (7,), F32),
    Parameter("c", (64, 33), F32),
]


def _reduced(
    spec: str, op: Op, device: torch.device | None, start: list[Saved] | None
) -> list[tuple[list[bytes], Saved]]:
    def buffers(layout: Layout) -> list[torch.Tensor]:
        return [torch.zeros(bucket.size, device=device) for bucket in layout.buckets]

    def main(comm: Communicator) -> tuple[list[bytes], Saved]:
        reducer = make_reducer(
            comm,
            PARAMETERS,
            op,
            4 * 37 * 29,
            policy=policy_of([only("*", spec, min_bytes=0, min_ndim=0)]),
            scale=0.7,
            make_buffers=None if device is None else buffers,
            device=device,
        )
        if start is not None:
            load_state([reducer], start[comm.rank])
        place, outs = reducer.layout.place(), []
        for number in range(3):
            for i, (name, view) in enumerate(reducer.views().items()):
                rng = np.random.default_rng([comm.rank, number, i])
                x = rng.standard_normal(len(view)).astype(np.float32)
                view[:] = x if device is None else _tensor(x, device)
                reducer.ready(place[name][0])
            reducer.finish()
            outs += [_bytes(buffer) for buffer in reducer.buffers]
        return outs, state_of([reducer])

    return cast(list[tuple[list[bytes], Saved]], run_threads(2, main))


@pytest.mark.parametrize("op", [Op.AVERAGE, Op.SUM])
@pytest.mark.parametrize("spec", ["onebit", "topk:ratio=0.1", "bf16:error_feedback=fp32"])
def test_reducers_are_alike(spec: str, op: Op, device: torch.device) -> None:
    first = _reduced(spec, op, None, None)
    host = _reduced(spec, op, None, [saved for _, saved in first])
    there = _reduced(spec, op, device, None)
    assert [outs for outs, _ in there] == [outs for outs, _ in first]
    there = _reduced(spec, op, device, [saved for _, saved in there])
    assert [outs for outs, _ in there] == [outs for outs, _ in host]


@needs_gpu
@pytest.mark.parametrize("spec", ["onebit", "topk:ratio=0.1", "fp16:error_feedback=fp32", "sketch"])
def test_optimizers_are_alike(spec: str) -> None:
    """What has no kernels for a GPU goes over the host."""

    def train(comm: Communicator, where: torch.device) -> list[bytes]:
        hvd.init(comm)
        try:
            rng = np.random.default_rng(0)
            shape = (300, 100)
            p = torch.nn.Parameter(torch.zeros(shape, device=where))
            optimizer = hvd.DistributedOptimizer(
                torch.optim.SGD([p], 1.0),
                [("p", p)],
                compression=only("*", spec, min_bytes=0),
            )
            grads = []
            for number in range(4):
                rng = np.random.default_rng([comm.rank, number])
                wanted = torch.from_numpy(rng.standard_normal(shape, np.float32)).to(where)
                (p * wanted).sum().backward()  # its gradient is ``wanted`` on every device
                optimizer.step()
                assert p.grad is not None
                assert p.grad.device.type == where.type
                grads.append(_bytes(p.grad))
                optimizer.zero_grad()
            return grads
        finally:
            hvd.shutdown()

    def main(comm: Communicator) -> None:
        cpu = train(comm, torch.device("cpu"))
        assert len(set(cpu)) == 4
        assert train(comm, torch.device("cuda")) == cpu

    run_threads(2, main)
