"""Powers of two, rounded at random; see ``kernels.natural``."""

import torch

from hpc_dl.compress.device.codec import DeviceCodec, Encoded
from hpc_dl.compress.kernels.natural import SMALLEST

_SMALLEST = float(SMALLEST)


class DeviceNatural(DeviceCodec):
    """A sign and seven bits of exponent."""

    block, width, random = 1024, 8, True

    def _encode(self, values: torch.Tensor, draws: torch.Tensor) -> Encoded:
        drawn = draws.to(torch.int32)
        words = values.view(torch.int32)
        magnitudes = words & 0x7FFFFFFF
        carried = (magnitudes + (drawn >> 1)) >> 23
        normal = (carried - (127 - 64)).clamp_(max=127)
        # A product with a power of two is exact; that of large values, not asked for, is not.
        tiny = drawn.to(torch.float32).mul_(2.0**-24) < values.abs().mul_(2.0**63)
        codes = torch.where(values.abs() >= _SMALLEST, normal, tiny.to(torch.int32))
        codes = torch.where(words < 0, codes + 128, codes)
        return Encoded(values.new_empty(0), codes.to(torch.uint8))

    def _decode(self, encoded: Encoded, size: int) -> torch.Tensor:
        codes = encoded.codes.to(torch.int32)
        exponents = codes & 127
        words = torch.where(exponents > 0, (exponents + (127 - 64)) << 23, 0)
        powers = words.view(torch.float32)
        return torch.where(codes > 127, -powers, powers)
