"""Casts of tensors, as all-reduce takes them; see ``compress.casts``."""

from collections.abc import Generator
from typing import Any

import torch

from hpc_dl.compress.base import Round


def rounds(
    x: torch.Tensor, out: torch.Tensor, left: torch.Tensor | None, dtype: torch.dtype
) -> Generator[Round, None, None]:
    """Cast, average, and cast back; ``left`` becomes what the cast leaves out."""
    narrowed: Any = x.to(dtype, copy=True)
    if left is not None:
        torch.sub(x, narrowed.float(), out=left)
    yield Round(narrowed, "average")
    out.copy_(narrowed)
