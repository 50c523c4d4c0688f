"""One bit for each value, with or without a scale for each block."""

import numpy as np
import torch

from hpc_dl.compress.device.codec import (
    DeviceCodec,
    Encoded,
    quotient,
    rows_of,
    spread,
    sum_in_lanes,
)
from hpc_dl.compress.kernels.signs import BLOCK


def _pack(negative: torch.Tensor) -> torch.Tensor:
    """Pack eight flags in a byte, the first in the lowest bit."""
    short = -len(negative) % 8
    flags = torch.nn.functional.pad(negative, (0, short)).view(-1, 8)
    shifts = torch.arange(8, dtype=torch.uint8, device=flags.device)
    return (flags << shifts).sum(1, dtype=torch.uint8)


def _unpack(bits: torch.Tensor, size: int) -> torch.Tensor:
    shifts = torch.arange(8, dtype=torch.uint8, device=bits.device)
    return ((bits[:, None] >> shifts) & 1).view(-1)[:size].bool()


class DeviceOneBit(DeviceCodec):
    """Signs, and the mean magnitude of each block."""

    block, width, numbers = BLOCK, 1, 1

    def _encode(self, values: torch.Tensor, draws: torch.Tensor) -> Encoded:
        scales = [
            quotient(sum_in_lanes(rows.abs()), float(rows.shape[1]))
            for rows in rows_of(values, BLOCK)
        ]
        return Encoded(torch.cat(scales)[None], _pack((values < 0).view(torch.uint8)))

    def _decode(self, encoded: Encoded, size: int) -> torch.Tensor:
        scales = spread(encoded.numbers[0], BLOCK, size)
        return torch.where(_unpack(encoded.codes, size), -scales, scales)


class DeviceSignSgd(DeviceCodec):
    """Signs alone."""

    block, width, random, drawn_for = 8, 1, True, 8

    def __init__(self, scale: float):
        self._scale = float(np.float32(scale))

    def _encode(self, values: torch.Tensor, draws: torch.Tensor) -> Encoded:
        zero = _pack((values == 0).view(torch.uint8)) & (draws >> 16).to(torch.uint8)
        return Encoded(values.new_empty(0), _pack((values < 0).view(torch.uint8)) | zero)

    def _decode(self, encoded: Encoded, size: int) -> torch.Tensor:
        scale = torch.full((size,), self._scale, device=encoded.codes.device)
        return torch.where(_unpack(encoded.codes, size), -scale, scale)
