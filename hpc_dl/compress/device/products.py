"""The products of PowerSGD on tensors; see ``compress.products``."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from hpc_dl.arrays import host_view, torch_view
from hpc_dl.compress.base import Floats
from hpc_dl.compress.products import Products

_TINY = float(np.finfo(np.float64).tiny)


class DeviceProducts(Products):
    """Large products are those of torch; thin matrices visit the host to be made orthonormal."""

    def __init__(self, device: torch.device):
        self._device = device

    def empty(self, size: int) -> Any:
        """Make a flat tensor."""
        return torch.empty(size, device=self._device)

    def to_host(self, x: Any) -> Floats:
        """Return an array of the host, which may share the memory of ``x``."""
        return host_view(x.cpu())

    def from_host(self, x: Floats) -> Any:
        """Return a tensor, which may share the memory of ``x``."""
        return torch_view(x).to(self._device)

    def join(self, parts: Sequence[Any], out: Any) -> None:
        """Write flat tensors one after the other."""
        torch.cat(list(parts), out=out)

    def times(self, matrix: Any, q: Any, out: Any) -> None:
        """Multiply by a thin matrix of unit columns; ``out`` is of shape (height, rank)."""
        wide = q.double()
        norms = wide.square().sum(1, keepdim=True).sqrt_().clamp_(min=_TINY)
        torch.matmul(matrix, (wide / norms).float().t(), out=out)

    def project(self, p: Any, matrix: Any, out: Any) -> None:
        """Multiply ``p`` by a matrix."""
        torch.matmul(p, matrix, out=out)

    def multiply(self, p: Any, q: Any, x: Any, out: Any, left: Any) -> None:
        """Write the product of two thin matrices, and what ``x`` has beside it.

        One direction after the other: an operation for each term has no order of its own.
        """
        torch.mul(p[0][:, None], q[0], out=out)
        for column, row in zip(p[1:], q[1:], strict=True):
            out.add_(column[:, None] * row)
        if left is not None:
            torch.sub(x, out, out=left)
