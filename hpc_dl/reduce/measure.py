"""Measure what the cost model needs: collectives on this cluster, exchanges on this machine."""

import functools
import importlib
import statistics
import time
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np

from hpc_dl.comm import Communicator, Op
from hpc_dl.compress import Codec, Scheme, Sparsifier, Unit
from hpc_dl.reduce.build import Division
from hpc_dl.reduce.cost import Line, Network, Work
from hpc_dl.reduce.exchange import make_exchange
from hpc_dl.reduce.exchange.memory import Memory
from hpc_dl.reduce.mirror import Mirror

#: A collective is measured with this many bytes, and with more until it takes long enough.
SMALL, LARGEST = 4 << 10, 16 << 20
#: Seconds after which a larger message would tell nothing new.
ENOUGH = 0.02
#: How often a short collective is timed: the machine may be busy with something else.
REPEATS = 8
#: Elements on which exchanges are measured, about: no cache holds them.
ELEMENTS = 1 << 22
#: How often they are timed.
RUNS = 5
#: A step that is behind all ramps.
LATE = 1 << 20
#: One entry of so many is large where compressors send what is large enough, not a number.
RARE = 100

#: Makes what a collective of so many bytes needs; returns the call, which alone is timed.
Prepare = Callable[[int], Callable[[], object]]


def _nothing() -> None:
    """Wait for nobody."""


def measure_network(comm: Communicator, narrow: Iterable[str] = (), device: Any = None) -> Network:
    """Measure the collectives; all ranks call this alike, and get the same figures.

    Args:
        narrow: names of types of which all-reduce is measured beside that of float32.
        device: of torch, where buckets lie.
    """
    memory, others = _memory(device), max(1, comm.size - 1)

    def allreduce(nbytes: int, dtype: str = "float32") -> Callable[[], object]:
        x = memory.zeros(nbytes // np.dtype(dtype).itemsize)
        if dtype != "float32":
            x = memory.narrow(x, np.dtype(dtype))
        return lambda: memory.allreduce(comm, x, Op.SUM)

    # Zeros that nobody has written would have no memory of their own to be read from.
    def alltoall(nbytes: int) -> Callable[[], object]:
        parts = [np.ones(nbytes // others, np.uint8)] * comm.size
        parts[comm.rank] = np.empty(0, np.uint8)
        return lambda: comm.alltoall(parts)

    def allgather(nbytes: int) -> Callable[[], object]:
        # All together give as much, so that many ranks need no more memory than few.
        mine = np.ones(max(1, nbytes // comm.size), np.uint8)
        return lambda: comm.allgather(mine)

    worked, began = time.process_time(), time.perf_counter()
    reduced = _line(comm, allreduce)
    working = (time.process_time() - worked) / max(time.perf_counter() - began, 1e-9)
    gathered = _line(comm, allgather)
    return Network(
        comm.size,
        reduced,
        _line(comm, alltoall),
        gathered._replace(rate=gathered.rate * comm.size),
        tuple((name, _line(comm, functools.partial(allreduce, dtype=name))) for name in narrow),
        min(1.0, _slowest(comm, working)),
    )


def _line(comm: Communicator, prepare: Prepare) -> Line:
    small = _timed(comm, prepare(SMALL))
    nbytes = 16 * SMALL
    large = _timed(comm, prepare(nbytes))
    while large < ENOUGH and nbytes < LARGEST:
        nbytes *= 4
        large = _timed(comm, prepare(nbytes))
    rate = max(large - small, 0.0) / (nbytes - SMALL)
    return Line(max(small - rate * SMALL, 0.0), rate)


def _timed(comm: Communicator, call: Callable[[], object]) -> float:
    """Return the seconds of a collective: the shortest of a few, of the slowest rank."""
    call()
    shortest = np.inf
    for _ in range(REPEATS):
        comm.barrier()
        begin = time.perf_counter()
        call()
        shortest = min(shortest, time.perf_counter() - begin)
        if _slowest(comm, shortest) > ENOUGH:  # no noise in that
            break
    return _slowest(comm, shortest)


def _slowest(comm: Communicator, seconds: float) -> float:
    return float(comm.allreduce(np.array([seconds]), Op.MAX)[0])


def schemes_of(divisions: Iterable[Division]) -> list[Scheme]:
    """Return the schemes whose work must be known, each once."""
    every = (scheme for division in divisions for scheme in division.schemes)
    return list(dict.fromkeys(scheme for scheme in every if scheme is not None))


def casts_of(divisions: Iterable[Division]) -> list[str]:
    """Return the types of buckets that gradients are cast to, each once."""
    return list(
        dict.fromkeys(
            str(bucket.dtype)
            for layout, schemes, casts in divisions
            for bucket, scheme, cast in zip(layout.buckets, schemes, casts, strict=True)
            if cast and scheme is None
        )
    )


def elements_of(divisions: Iterable[Division]) -> int:
    """Return on how many elements to measure: a large bucket of these."""
    sizes = (bucket.size for division in divisions for bucket in division.layout.buckets)
    return min(ELEMENTS, max(sizes, default=1))


def measure_work(
    scheme: Scheme,
    size: int,
    elements: int = ELEMENTS,
    device: Any = None,
    together: Callable[[], object] = _nothing,
) -> Work:
    """Measure what a rank does in an exchange of one bucket, on this machine.

    The exchange is that of the engine, with what it keeps and sums, but the other ranks are made
    up; see ``Mirror``.

    Args:
        size: ranks that are made up.
        elements: of the bucket, about.
        device: of torch, where gradients lie; compressors without kernels for it work on the
            host, and the way there and back counts.
        together: called before each run. Where all ranks of a machine run at once, a barrier
            makes sure that they do so here.
    """
    unit = _unit(scheme, size, elements)
    gradient = _gradient(scheme, unit.size)
    memory, there = _memory(device), device if _has_kernels(scheme, device) else None
    comm = Mirror(size)
    exchange = make_exchange(comm, unit, scheme, device=there)
    home = gradient if there is None else memory.from_host(gradient)
    bucket, step = exchange.memory.copy(home), max(LATE, scheme.warmup)
    outside = memory.from_host(gradient) if device is not None and there is None else None

    def run() -> None:
        with memory.working():  # when it is left, all is done
            if outside is None:
                exchange.run(bucket, step)
                return
            inside = memory.to_host(outside)
            exchange.run(inside, step)
            outside[:] = memory.from_host(inside)

    def prepare() -> None:
        comm.calls.clear()
        bucket[:] = home
        together()

    try:
        seconds = _seconds(run, prepare)
    finally:
        comm.close()  # ends the thread that watches for stalls
    payload = max(1.0, scheme.compressor.payload_bytes(unit, size))
    calls = tuple(call._replace(nbytes=call.nbytes / payload) for call in comm.calls)
    return Work(seconds / (4 * unit.size), calls)


def measure_cast(
    dtype: str,
    elements: int = ELEMENTS,
    device: Any = None,
    together: Callable[[], object] = _nothing,
) -> float:
    """Return the seconds of a cast of float32 and back, for each of its bytes."""
    memory = _memory(device)
    x = memory.from_host(_normal(elements))
    kept = memory.copy(x)

    def cast() -> None:
        with memory.working():
            memory.widen(memory.narrow(x, np.dtype(dtype)), kept)

    return _seconds(cast, together) / (4 * elements)


def _seconds(call: Callable[[], object], prepare: Callable[[], object]) -> float:
    """Return the seconds of a call: the median of a few, after one that may compile."""
    taken = []
    for _ in range(RUNS + 1):
        prepare()
        begin = time.perf_counter()
        call()
        taken.append(time.perf_counter() - begin)
    return statistics.median(taken[1:])


def _unit(scheme: Scheme, size: int, elements: int) -> Unit:
    """Make a matrix that can be cut into equal shards, near to a square if there are few."""
    align = scheme.compressor.align if isinstance(scheme.compressor, Codec) else 1
    side = max(1, round(elements**0.5))
    width = -(-side // align) * align
    return Unit.single("measured", (size * max(1, round(elements / width / size)), width))


def _gradient(scheme: Scheme, size: int) -> np.ndarray[Any, np.dtype[np.float32]]:
    if isinstance(scheme.compressor, Sparsifier) and not scheme.compressor.fixed:
        x = np.zeros(size, np.float32)
        x[::RARE] = 2.0**40
        return x
    return _normal(size)


def _normal(size: int) -> np.ndarray[Any, np.dtype[np.float32]]:
    return np.random.default_rng(0).standard_normal(size, np.float32)


def _memory(device: Any) -> Memory:
    if device is None:
        return Memory()
    module = importlib.import_module("hpc_dl.reduce.exchange.device")  # loads torch
    memory: Memory = module.DeviceMemory(device)
    return memory


def _has_kernels(scheme: Scheme, device: Any) -> bool:
    if device is None:
        return False
    module = importlib.import_module("hpc_dl.compress.device")  # loads torch
    return bool(module.has_kernels(scheme.compressor))
