"""What was not sent, kept in the memory of the device; see ``compress.residual``."""

from typing import Any

import torch

from hpc_dl.compress.device.codec import quotient, rows_of, spread
from hpc_dl.compress.kernels import maxabs
from hpc_dl.compress.residual import Residual


class DeviceResidual(Residual):
    """A flat tensor of float32, perhaps stored in another type."""

    def __init__(self, kind: str, size: int, device: torch.device):
        dtype = torch.bfloat16 if kind == "bf16" else torch.float32
        self._values = torch.zeros(size, dtype=dtype, device=device)

    def load(self) -> Any:
        """Return a copy of float32."""
        return self._values.to(torch.float32, copy=True)

    def store(self, values: Any) -> None:
        """Round to the nearest; a tensor of the same type is taken over."""
        self._values = values.to(self._values.dtype)

    @property
    def nbytes(self) -> int:
        """Four or two bytes for each value."""
        return self._values.numel() * self._values.element_size()


class DeviceInt8Residual(DeviceResidual):
    """127 steps up to the largest magnitude of each block."""

    def __init__(self, size: int, device: torch.device):
        self._size = size
        self._levels = torch.zeros(size, dtype=torch.int8, device=device)
        self._scales = torch.zeros(-(-size // maxabs.BLOCK), device=device)

    def load(self) -> Any:
        """Widen."""
        scales = spread(self._scales, maxabs.BLOCK, self._size)
        return self._levels.float().mul_(scales)

    def store(self, values: Any) -> None:
        """Round to the nearest step."""
        if self._size == 0:
            return
        scales, levels = [], []
        for rows in rows_of(values, maxabs.BLOCK):
            scale = quotient(rows.abs().amax(1), 127.0)
            inverse = torch.where(scale > float(maxabs.TINY), quotient(1.0, scale), 0.0)
            scales.append(scale)
            levels.append((rows * inverse[:, None]).round_().to(torch.int8).view(-1))
        self._scales, self._levels = torch.cat(scales), torch.cat(levels)

    @property
    def nbytes(self) -> int:
        """One byte for each value, four for each block."""
        return self._size + 4 * self._scales.numel()


def make_residual(kind: str, size: int, device: torch.device) -> Residual | None:
    """Make a residual of zeros; None for ``off``."""
    if kind == "off":
        return None
    if kind == "int8":
        return DeviceInt8Residual(size, device)
    return DeviceResidual(kind, size, device)
