"""Exchanges of buckets in the memory of a GPU: only encodings cross to the host.

The device is used in a stream of its own, so that encoding does not wait for all of backward,
which is queued in another. On the CPU, tensors serve to test it.
"""

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch

from hpc_dl.arrays import host_view, torch_view
from hpc_dl.comm import Communicator, Op
from hpc_dl.compress import (
    Array,
    Codec,
    Floats,
    Scheme,
    Sparse,
    Sparsifier,
    State,
    Step,
    Unit,
)
from hpc_dl.compress.device import Piece, codec_of, rounds_of, select_of
from hpc_dl.compress.device.residual import make_residual
from hpc_dl.compress.device.select import largest
from hpc_dl.compress.residual import Residual
from hpc_dl.errors import UnsupportedError
from hpc_dl.reduce.exchange.base import Exchange
from hpc_dl.reduce.exchange.gather import Gather, unpack
from hpc_dl.reduce.exchange.memory import Memory
from hpc_dl.reduce.exchange.rounds import Rounds
from hpc_dl.reduce.exchange.two_phase import TwoPhase

#: What is as large counts as infinite; see ``kernels.checks``.
_LARGEST = 2.0**100


class DeviceMemory(Memory):
    """The memory of a device of torch."""

    def __init__(self, device: torch.device):
        self._device = device
        self._stream = _stream(device) if device.type == "cuda" else None
        self._events: list[Any] = []
        self._depth = 0

    def note(self) -> None:
        """Record an event in the caller's stream, for which the next exchange waits."""
        if self._stream is not None:
            self._events.append(torch.cuda.current_stream(self._device).record_event())

    @contextmanager
    def working(self) -> Iterator[None]:
        """Enter the stream, after all that was noted, or else all that was started."""
        if self._stream is None or self._depth:
            yield
            return
        events, self._events = self._events, []
        for event in events:
            self._stream.wait_event(event)
        if not events:
            torch.cuda.synchronize(self._device)
        self._depth += 1
        try:
            with torch.cuda.stream(self._stream):
                yield
        finally:
            self._depth -= 1
            self._stream.synchronize()

    def zeros(self, size: int) -> Any:
        """Make a flat tensor."""
        with self.working():
            return torch.zeros(size, device=self._device)

    def residual(self, kind: str, size: int) -> Residual | None:
        """Make a residual of zeros; None for ``off``."""
        with self.working():
            return make_residual(kind, size, self._device)

    def copy(self, x: Any) -> Any:
        """Return a copy."""
        return x.clone()

    def to_host(self, x: Any) -> Floats:
        """Return a copy on the host."""
        return np.array(host_view(x.cpu()))

    def from_host(self, x: Array) -> Any:
        """Return a tensor of an array's values."""
        return torch_view(x).to(self._device)

    def is_finite(self, x: Any) -> bool:
        """Tell whether no value is, or is near to, infinity; a NaN is larger than all."""
        return len(x) == 0 or bool(x.abs().amax() < _LARGEST)

    def dot(self, x: Any, y: Any) -> float:
        """Multiply; not finite where that overflows. Rounded otherwise than on the host."""
        return float(torch.dot(x, y))

    def narrow(self, x: Any, dtype: np.dtype[Any]) -> Any:
        """Return ``x`` in another type; NaNs may have other bits than on the host."""
        return x.to(_torch_type(dtype))

    def widen(self, x: Any, out: Any) -> None:
        """Write ``x`` to ``out`` as float32."""
        out.copy_(x)

    def allreduce(self, comm: Communicator, x: Any, op: Op) -> None:
        """Combine a tensor over the ranks; through the host, unless ``comm`` takes it."""
        if self._stream is not None:
            try:
                comm.check_device(x)
            except UnsupportedError:
                pass
            else:
                self._stream.synchronize()
                comm.allreduce(x, op)
                return
        host = x.cpu()
        comm.allreduce(host_view(host), op)
        if host is not x:
            x.copy_(host)


@functools.cache
def _stream(device: torch.device) -> torch.cuda.Stream:
    """Return the one stream of all exchanges: torch keeps free memory for each by itself."""
    return torch.cuda.Stream(device)


class DeviceTwoPhase(TwoPhase):
    """Encodes and decodes all shards of a bucket in one go."""

    def __init__(self, codec: Codec, *args: Any):
        found = codec_of(codec)
        assert found is not None
        self._kernels = found
        super().__init__(*args)

    def _encode_shards(self, bucket: Any, left: Any, step: Step, parts: list[Array]) -> None:
        lo, hi = self._lo, self._hi
        if hi - lo == self.unit.size:
            return
        # This rank's own shard, too: fewer operations, if larger ones.
        own = None if left is None else left[lo:hi].clone()
        shards = [(owner, a, b) for owner, (a, b) in enumerate(self._shares) if b > a]
        pieces = [Piece(a, b, self._key(step, owner)) for owner, a, b in shards]
        payloads = self._kernels.encode(bucket, left, pieces)
        for (owner, _, _), payload in zip(shards, payloads, strict=True):
            if owner != step.rank:
                parts[owner] = payload
        if left is not None:
            left[lo:hi] = own

    def _decode_shards(self, payloads: list[Array], bucket: Any) -> None:
        there = [
            (payload, b - a)
            for (a, b), payload in zip(self._shares, payloads, strict=True)
            if b > a
        ]
        payloads, sizes = [payload for payload, _ in there], [size for _, size in there]
        self._kernels.decode(payloads, sizes, bucket, add=False)

    def _encode(self, x: Any, left: Any, key: int) -> Array:
        return self._kernels.encode(x, left, [Piece(0, len(x), key)])[0]

    def _decode_add(self, payload: Array, out: Any) -> None:
        self._kernels.decode([payload], [len(out)], out, add=True)


class DeviceGather(Gather):
    """Selects on the device; what is selected goes to the host."""

    def __init__(self, compressor: Sparsifier, *args: Any):
        found = select_of(compressor)
        assert found is not None
        self._from_device = found
        super().__init__(*args)

    def _select(self, bucket: Any, left: Any, state: State, step: Step) -> Sparse:
        return self._from_device(bucket, left, step)

    def _largest(self, mine: Any, server: Any, count: int, step: Step) -> Sparse:
        return largest(mine, server, count, False, step)

    def _add(self, part: Array, out: Any) -> None:
        entries = unpack(part)  # no two of them at one place
        out[self.memory.from_host(entries.indices)] += self.memory.from_host(entries.values)

    def _restore(self, total: Any, out: Any) -> None:
        out.copy_(total)


class DeviceRounds(Rounds):
    """Makes buffers on the device; what the compressor remembers is on the host."""

    def _rounds(self, x: Any, out: Any, left: Any, state: State, step: Step) -> Any:
        found = rounds_of(self.scheme.compressor)
        assert found is not None
        return found(x, out, left, state, self.unit, step)


def make_device_exchange(
    comm: Communicator, unit: Unit, scheme: Scheme, seed: int, device: torch.device
) -> Exchange:
    """Make the exchange of a scheme whose compressor has kernels for tensors."""
    compressor, memory = scheme.compressor, DeviceMemory(device)
    if isinstance(compressor, Codec):
        return DeviceTwoPhase(compressor, comm, unit, scheme, seed, memory)
    if isinstance(compressor, Sparsifier):
        return DeviceGather(compressor, comm, unit, scheme, seed, memory)
    return DeviceRounds(comm, unit, scheme, seed, memory)


def _torch_type(dtype: np.dtype[Any]) -> torch.dtype:
    found: torch.dtype = torch_view(np.empty(0, dtype)).dtype
    return found
