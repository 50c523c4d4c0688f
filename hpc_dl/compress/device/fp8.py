"""Eight-bit floats with a scale for each block; see ``kernels.fp8``."""

import torch

from hpc_dl.compress.device.codec import DeviceCodec, Encoded, quotient, rows_of, spread
from hpc_dl.compress.kernels.fp8 import LARGEST, LIMIT, TINY

_LARGEST, _LIMIT, _TINY = float(LARGEST), float(LIMIT), float(TINY)


class DeviceFloat8(DeviceCodec):
    """The type e4m3, rounded to the nearest by torch as by the host."""

    width, numbers = 8, 1

    def __init__(self, block: int):
        self.block = block

    def _encode(self, values: torch.Tensor, draws: torch.Tensor) -> Encoded:
        scales, codes = [], []
        for rows in rows_of(values, self.block):
            scale = quotient(rows.abs().amax(1).clamp_(max=_LIMIT), _LARGEST)
            inverse = torch.where(scale > _TINY, quotient(1.0, scale), 0.0)
            scaled = (rows * inverse[:, None]).clamp_(-_LARGEST, _LARGEST)
            scales.append(torch.where(scale > _TINY, scale, 0.0))
            codes.append(scaled.to(torch.float8_e4m3fn).view(torch.uint8).view(-1))
        return Encoded(torch.cat(scales)[None], torch.cat(codes))

    def _decode(self, encoded: Encoded, size: int) -> torch.Tensor:
        values = encoded.codes.view(torch.float8_e4m3fn).to(torch.float32)
        return values.mul_(spread(encoded.numbers[0], self.block, size))
