"""Kernels for tensors on a GPU: the same bytes as those of the host's, so only they travel.

They are plain torch operations, each a kernel of its own, which rounds its result as IEEE 754
says: no product and sum are fused, and a sum is taken in the host's order by one operation for
each term. Division needs care; see ``codec.quotient``. They run on any device, the CPU too. Only
the matrix products of PowerSGD that are averaged afterwards differ from the host's, by rounding.

This imports torch, so the core imports it only where it is given a tensor.
"""

from hpc_dl.compress.base import Compressor
from hpc_dl.compress.blocks import Levels
from hpc_dl.compress.device.codec import DeviceCodec, Piece
from hpc_dl.compress.device.fp8 import DeviceFloat8
from hpc_dl.compress.device.levels import DeviceLevels
from hpc_dl.compress.device.natural import DeviceNatural
from hpc_dl.compress.device.rounds import Rounds, rounds_of
from hpc_dl.compress.device.select import Select, select_of
from hpc_dl.compress.device.signs import DeviceOneBit, DeviceSignSgd
from hpc_dl.compress.fp8 import Float8
from hpc_dl.compress.maxmin import Int4, Int8
from hpc_dl.compress.natural import Natural
from hpc_dl.compress.qsgd import Qsgd
from hpc_dl.compress.signs import OneBit, SignSgd

__all__ = [
    "DeviceCodec",
    "Piece",
    "Rounds",
    "Select",
    "codec_of",
    "has_kernels",
    "rounds_of",
    "select_of",
]


def codec_of(compressor: Compressor) -> DeviceCodec | None:
    """Return the codec that gives the same bytes on tensors, if there is one.

    The class itself counts: one derived from it may encode otherwise.
    """
    kind = type(compressor)
    if kind is OneBit:
        return DeviceOneBit()
    if isinstance(compressor, SignSgd) and kind is SignSgd:
        return DeviceSignSgd(compressor.scale)
    if isinstance(compressor, Levels) and kind in (Int8, Int4, Qsgd):
        return DeviceLevels(compressor)
    if isinstance(compressor, Float8) and kind is Float8:
        return DeviceFloat8(compressor.block)
    return DeviceNatural() if kind is Natural else None


def has_kernels(compressor: Compressor) -> bool:
    """Tell whether a compressor works on tensors."""
    return any(find(compressor) is not None for find in (rounds_of, codec_of, select_of))
