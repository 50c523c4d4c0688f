"""Predict what a step costs with each compression.

A collective takes ``start + bytes * rate``: the linear model of Hockney, "The communication
challenge for MPP" (1994), measured as it is on this cluster or derived from a link. Which
collectives a compressor needs, and what a rank has to do beside them, is measured on the exchange
itself; see ``measure``. What of it is hidden behind backward follows from the time that backward
leaves.
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from hpc_dl.compress import Scheme, Unit
from hpc_dl.reduce.build import Division
from hpc_dl.reduce.compression import unit_of
from hpc_dl.reduce.mirror import Call


class Line(NamedTuple):
    """Seconds of a collective."""

    start: float
    rate: float
    """Seconds for each byte: see ``Network``."""

    def seconds(self, nbytes: float) -> float:
        """Return the seconds for so many bytes."""
        return self.start + self.rate * nbytes


class Network(NamedTuple):
    """What collectives cost among these ranks."""

    size: int
    allreduce: Line
    """By the bytes of the buffer."""
    alltoall: Line
    """By the bytes that a rank sends to the others together."""
    allgather: Line
    """By the bytes that each rank gives."""
    narrow: tuple[tuple[str, Line], ...] = ()
    """All-reduce of other types than float32, by name, whose sums take longer or shorter."""
    working: float = 0.0
    """Part of the time in which the processor is at work, and not waiting for the wire."""

    def seconds(self, call: Call) -> float:
        """Return the seconds of a collective."""
        if call.name == "allreduce":
            return dict(self.narrow).get(call.dtype, self.allreduce).seconds(call.nbytes)
        return (self.alltoall if call.name == "alltoall" else self.allgather).seconds(call.nbytes)

    def sent(self, call: Call) -> float:
        """Return the bytes that a rank sends for a collective."""
        others = self.size - 1
        if call.name == "allreduce":
            return 2 * others / self.size * call.nbytes
        return call.nbytes if call.name == "alltoall" else others * call.nbytes


def network_of_link(size: int, bandwidth: float, latency: float) -> Network:
    """Derive the cost of collectives from a link.

    Args:
        size: ranks, each with such a link.
        bandwidth: bytes in a second.
        latency: seconds of a message.
    """
    others = size - 1
    return Network(
        size,
        Line(2 * others * latency, 2 * others / size / bandwidth),
        Line(others * latency, 1 / bandwidth),
        Line(others * latency, others / bandwidth),
    )


class Work(NamedTuple):
    """What one exchange makes a rank do."""

    seconds: float
    """Of encoding, summing and decoding, for each byte of float32."""
    calls: tuple[Call, ...]
    """The collectives, with bytes for each byte of ``payload_bytes``."""


class Costs(NamedTuple):
    """What was measured."""

    network: Network
    works: Mapping[Scheme, Work]
    casts: Mapping[str, float]
    """By type, seconds of a cast to it and back for each byte of float32."""


class Load(NamedTuple):
    """What a training step is made of beside reduction."""

    compute: float
    """Seconds of a step without any communication."""
    backward: float
    """Seconds of it in which communication can be hidden."""
    spare_core: bool = True
    """Whether communication has a core that the computation does not use."""


class Prediction(NamedTuple):
    """What a step costs with one compression."""

    name: str
    sent: float
    """Bytes that a rank sends."""
    network: float
    """Seconds of communication."""
    kernels: float
    """Seconds of encoding, decoding and casts."""
    step: float
    """Seconds of the step."""


class _Cost(NamedTuple):
    """Of one bucket."""

    sent: float
    network: float
    kernels: float
    cast: float


def predict(name: str, division: Division, load: Load, costs: Costs) -> Prediction:
    """Predict a step in which the buckets travel as ``division`` says."""
    parts = zip(division.layout.buckets, division.schemes, division.casts, strict=True)
    each = [
        _dense_cost(bucket.size, str(bucket.dtype), bucket.nbytes, cast, costs)
        if scheme is None
        else _unit_cost(scheme, unit_of(bucket), costs)
        for bucket, scheme, cast in parts
    ]
    total = _Cost(*(sum(column) for column in zip(_Cost(0, 0, 0, 0), *each, strict=True)))
    busy = total.network + total.kernels
    # The last bucket leaves when backward is over, so its time is never hidden.
    tail = each[-1].network + each[-1].kernels if each else 0.0
    exposed = max(tail, busy - load.backward)
    stolen = 0.0
    if not load.spare_core:
        # What the processor does beside backward, it takes away from backward.
        stolen = min(busy - exposed, total.kernels + costs.network.working * total.network)
    # The training thread casts, as it moves gradients to their buckets and back.
    step = load.compute + total.cast + exposed + max(stolen, 0.0)
    return Prediction(name, total.sent, total.network, total.kernels + total.cast, step)


def _dense_cost(size: int, dtype: str, nbytes: int, cast: bool, costs: Costs) -> _Cost:
    call = Call("allreduce", nbytes, dtype)
    casting = 4 * size * costs.casts.get(dtype, 0.0) if cast else 0.0
    return _Cost(costs.network.sent(call), costs.network.seconds(call), 0.0, casting)


def _unit_cost(scheme: Scheme, unit: Unit, costs: Costs) -> _Cost:
    work, network = costs.works[scheme], costs.network
    payload = scheme.compressor.payload_bytes(unit, network.size)
    calls = [call._replace(nbytes=call.nbytes * payload) for call in work.calls]
    sent, seconds = sum(map(network.sent, calls)), sum(map(network.seconds, calls))
    return _Cost(sent, seconds, 4 * unit.size * work.seconds, 0.0)


def best(predictions: Sequence[Prediction], gain: float = 0.03) -> Prediction:
    """Choose the first that none beats by more than ``gain``, a part of its step.

    Args:
        predictions: those that change gradients least first.
    """
    fastest = min(prediction.step for prediction in predictions)
    return next(p for p in predictions if fastest >= p.step * (1 - gain))
