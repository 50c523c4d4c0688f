"""Measure what the cost model needs: collectives on this cluster, kernels on this machine."""

import time
from collections.abc import Callable
from typing import Any

import numpy as np

from hpc_dl.comm import Communicator, Op
from hpc_dl.compress import AllReduced, Codec, Floats, Scheme, Sparsifier, Step, Unit
from hpc_dl.compress.kernels.topk import scatter_add
from hpc_dl.reduce.cost import Kernel, Line, Network

#: A collective is measured with this many bytes, and with more until it takes long enough.
SMALL, LARGEST = 4 << 10, 16 << 20
#: Seconds after which a larger message would tell nothing new.
ENOUGH = 0.02
#: How often a short collective is timed: the machine may be busy with something else.
REPEATS = 8
#: Elements on which kernels are measured.
ELEMENTS = 1 << 20


def measure_network(comm: Communicator) -> Network:
    """Measure the collectives; all ranks call this alike, and get the same figures."""

    def allreduce(nbytes: int) -> None:
        comm.allreduce(np.zeros(nbytes // 4, np.float32), Op.SUM)

    def alltoall(nbytes: int) -> None:
        comm.alltoall([np.zeros(nbytes // comm.size, np.uint8)] * comm.size)

    def allgather(nbytes: int) -> None:
        comm.allgather(np.zeros(nbytes, np.uint8))

    return Network(comm.size, *(_line(comm, call) for call in (allreduce, alltoall, allgather)))


def _line(comm: Communicator, call: Callable[[int], None]) -> Line:
    small = _timed(comm, call, SMALL)
    nbytes = 16 * SMALL
    large = _timed(comm, call, nbytes)
    while large < ENOUGH and nbytes < LARGEST:
        nbytes *= 4
        large = _timed(comm, call, nbytes)
    rate = max(large - small, 0.0) / (nbytes - SMALL)
    return Line(max(small - rate * SMALL, 0.0), rate)


def _timed(comm: Communicator, call: Callable[[int], None], nbytes: int) -> float:
    """Return the seconds of a collective: the shortest of a few, of the slowest rank."""
    call(nbytes)
    shortest = np.inf
    for _ in range(REPEATS):
        comm.barrier()
        begin = time.perf_counter()
        call(nbytes)
        shortest = min(shortest, time.perf_counter() - begin)
        if comm.allreduce(np.array([shortest]), Op.MAX)[0] > ENOUGH:  # no noise in that
            break
    return float(comm.allreduce(np.array([shortest]), Op.MAX)[0])


def measure_kernel(scheme: Scheme, elements: int = ELEMENTS) -> Kernel:
    """Measure a compressor's kernels on this machine, on one core."""
    compressor = scheme.compressor
    if scheme.name == "none":
        return Kernel(0.0, 0.0)
    side = int(elements**0.5)
    unit = Unit.single("measured", (side, side))
    x = np.random.default_rng(0).standard_normal(unit.size, np.float32)
    left = np.zeros_like(x)
    out, nbytes = np.empty_like(x), 4 * unit.size
    state = compressor.init(unit)
    keep = scheme.residual != "off"
    if isinstance(compressor, Codec):
        if keep:
            encode = _seconds(lambda: compressor.encode_with_residual(x, left, 0))
        else:
            encode = _seconds(lambda: compressor.encode(x, 0))
        payload = compressor.encode(x, 0)
        decode = _seconds(lambda: compressor.decode_add(payload, out))
        return Kernel(encode / nbytes, decode / nbytes)
    if isinstance(compressor, Sparsifier):
        step = Step(1 << 30)
        encode = _seconds(
            lambda: (
                compressor.select_with_residual(x, left, state, unit, step)
                if keep
                else compressor.select(x, state, unit, step)
            )
        )
        chosen = compressor.select(x, state, unit, step)
        decode = _seconds(lambda: scatter_add(*chosen, out))
        return Kernel(encode / nbytes, decode / nbytes)
    assert isinstance(compressor, AllReduced)
    rest = left if keep else None
    encode = _seconds(lambda: _rounds(compressor, x, out, rest, state, unit))
    return Kernel(encode / nbytes, 0.0)


def _rounds(
    compressor: AllReduced,
    x: Floats,
    out: Floats,
    left: Floats | None,
    state: Any,
    unit: Unit,
) -> None:
    for _ in compressor.rounds(x, out, left, state, unit, Step(0)):
        pass


def _seconds(call: Callable[[], object]) -> float:
    """Return the seconds of a call: the shortest of a few, after one that may compile."""
    call()
    taken = []
    for _ in range(3):
        begin = time.perf_counter()
        call()
        taken.append(time.perf_counter() - begin)
    return min(taken)
