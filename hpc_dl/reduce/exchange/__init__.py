"""How a compressed bucket is averaged: the reduction class chooses the collective."""

import importlib
from typing import Any

from hpc_dl.comm import Communicator
from hpc_dl.compress import AllReduced, Codec, Scheme, Unit
from hpc_dl.reduce.exchange.base import Exchange, Health
from hpc_dl.reduce.exchange.gather import Gather
from hpc_dl.reduce.exchange.rounds import Rounds
from hpc_dl.reduce.exchange.two_phase import TwoPhase

__all__ = ["Exchange", "Health", "make_exchange"]


def make_exchange(
    comm: Communicator, unit: Unit, scheme: Scheme, seed: int = 0, device: Any = None
) -> Exchange:
    """Make the exchange that a scheme's compressor calls for.

    Args:
        device: of torch, where buckets are tensors; the compressor must have kernels for them
            (``hpc_dl.compress.device.has_kernels``). By default they are arrays of the host.
    """
    if device is not None:
        module = importlib.import_module("hpc_dl.reduce.exchange.device")  # loads torch
        exchange: Exchange = module.make_device_exchange(comm, unit, scheme, seed, device)
        return exchange
    kind: type[Exchange] = Gather
    if isinstance(scheme.compressor, AllReduced):
        kind = Rounds
    elif isinstance(scheme.compressor, Codec):
        kind = TwoPhase
    return kind(comm, unit, scheme, seed)
