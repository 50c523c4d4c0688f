"""Eight-bit floats with a scale for each block."""

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from hpc_dl.compress.base import Bytes, Codec, Floats, Unit
from hpc_dl.compress.blocks import check_block
from hpc_dl.compress.kernels import fp8


@dataclass(frozen=True)
class Float8(Codec):
    """The type e4m3: 4 bits of precision, on a scale of the largest magnitude of each block.

    Micikevicius et al., "FP8 formats for deep learning", 2022; a scale for each block: Peng
    et al., "FP8-LM: training FP8 large language models", 2023.
    """

    block: int = 1024

    name: ClassVar[str] = "fp8"
    summary: ClassVar[str] = "float8 e4m3, and a scale for each 1024"

    def __post_init__(self) -> None:
        check_block(self.block)

    @property
    def align(self) -> int:
        """Shards consist of whole blocks."""
        return self.block

    def payload_bytes(self, unit: Unit, size: int) -> float:
        """Return a byte for each value and four for each block."""
        return self._header(unit.size) + unit.size

    def encode(self, x: Floats, key: int) -> Bytes:
        """Encode ``x``."""
        return self._encode(x, x, keep=False)

    def encode_with_residual(self, x: Floats, left: Floats, key: int) -> Bytes:
        """Encode ``x + left``; ``left`` becomes the rest."""
        return self._encode(x, left, keep=True)

    def decode(self, payload: Bytes, out: Floats) -> None:
        """Write the decoded values."""
        self._decode(payload, out, add=False)

    def decode_add(self, payload: Bytes, out: Floats) -> None:
        """Add the decoded values."""
        self._decode(payload, out, add=True)

    def _header(self, size: int) -> int:
        return 4 * -(-size // self.block)

    def _encode(self, x: Floats, left: Floats, keep: bool) -> Bytes:
        header = self._header(len(x))
        payload = np.empty(header + len(x), np.uint8)
        scales = payload[:header].view(np.float32)
        fp8.encode(x, left, keep, self.block, scales, payload[header:])
        return payload

    def _decode(self, payload: Bytes, out: Floats, add: bool) -> None:
        header = self._header(len(out))
        scales = payload[:header].view(np.float32)
        fp8.decode(scales, payload[header:], self.block, out, add)
