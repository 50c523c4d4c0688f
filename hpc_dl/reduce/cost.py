"""Predict what a step costs with each compressor.

A collective takes ``start + bytes * rate``: the linear model of Hockney, "The communication
challenge for MPP" (1994), measured as it is on this cluster or derived from a link. What of it is
hidden behind backward follows from the time that backward leaves.
"""

from collections.abc import Sequence
from typing import NamedTuple

from hpc_dl.compress import Reduction, Scheme, Sparsifier, Step, Unit
from hpc_dl.compress.casts import Cast
from hpc_dl.reduce.exchange.gather import DENSE_ABOVE


class Line(NamedTuple):
    """Seconds of a collective."""

    start: float
    rate: float
    """Seconds for each byte that a rank contributes."""

    def seconds(self, nbytes: float) -> float:
        """Return the seconds for so many bytes from each rank."""
        return self.start + self.rate * nbytes


class Network(NamedTuple):
    """What collectives cost among these ranks."""

    size: int
    allreduce: Line
    alltoall: Line
    allgather: Line


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
        Line(others * latency, others / size / bandwidth),
        Line(others * latency, others / bandwidth),
    )


class Kernel(NamedTuple):
    """Seconds that a compressor's kernels take for each byte of float32."""

    encode: float
    decode: float


class Load(NamedTuple):
    """What a training step is made of."""

    units: tuple[Unit, ...]
    """What is compressed together, one after the other."""
    compute: float
    """Seconds of a step without any communication."""
    backward: float
    """Seconds of it in which communication can be hidden."""
    spare_core: bool = True
    """Whether kernels run beside the computation, on a core that it does not use."""


class Prediction(NamedTuple):
    """What a step costs with one scheme."""

    scheme: Scheme
    sent: float
    """Bytes that a rank sends."""
    network: float
    """Seconds of communication."""
    kernels: float
    """Seconds of encoding and decoding."""
    step: float
    """Seconds of the step."""


def predict(scheme: Scheme, load: Load, network: Network, kernel: Kernel) -> Prediction:
    """Predict a step in which all units travel with one scheme."""
    costs = [_unit_cost(scheme, unit, network, kernel) for unit in load.units]
    sent = sum(cost[0] for cost in costs)
    seconds = sum(cost[1] for cost in costs)
    kernels = sum(cost[2] for cost in costs)
    busy = seconds + kernels
    # The last unit leaves when backward is over, so its time is never hidden.
    tail = (costs[-1][1] + costs[-1][2]) if costs else 0.0
    exposed = max(tail, busy - load.backward)
    stolen = 0.0 if load.spare_core else min(kernels, max(0.0, busy - exposed))
    return Prediction(scheme, sent, seconds, kernels, load.compute + exposed + stolen)


def _unit_cost(
    scheme: Scheme, unit: Unit, network: Network, kernel: Kernel
) -> tuple[float, float, float]:
    """Return bytes sent, seconds of communication, and seconds of kernels."""
    size, compressor = network.size, scheme.compressor
    payload = compressor.payload_bytes(unit, size)
    dense = 4 * unit.size
    ring = 2 * (size - 1) / size * payload
    if scheme.name == "none" or isinstance(compressor, Cast):
        return ring, network.allreduce.seconds(payload), dense * kernel.encode
    if compressor.reduction is Reduction.TWO_PHASE:
        seconds = network.alltoall.seconds(payload) + network.allgather.seconds(payload / size)
        return ring, seconds, dense * (kernel.encode + 2 * kernel.decode)
    if isinstance(compressor, Sparsifier):
        density = compressor.density(unit, Step(1 << 30, 0, size))
        if size * density > DENSE_ABOVE:
            seconds = network.alltoall.seconds(payload) + network.allgather.seconds(payload / size)
            return ring, seconds, dense * (kernel.encode + 2 * kernel.decode)
        seconds = network.allgather.seconds(payload)
        return (size - 1) * payload, seconds, dense * (kernel.encode + size * kernel.decode)
    rounds = 1 if compressor.reduction is Reduction.LINEAR else 2
    seconds = rounds * network.allreduce.start + network.allreduce.rate * payload
    return ring, seconds, dense * (kernel.encode + kernel.decode)


def best(predictions: Sequence[Prediction], gain: float = 0.03) -> Prediction:
    """Choose the first that none beats by more than ``gain``, a part of its step.

    Args:
        predictions: those that change gradients least first.
    """
    fastest = min(prediction.step for prediction in predictions)
    return next(p for p in predictions if fastest >= p.step * (1 - gain))
