"""What all-reduce combines, made on tensors: casts, and matrices of low rank."""

import functools
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch

from hpc_dl.arrays import torch_view
from hpc_dl.compress.base import Compressor, Round, State, Step, Unit
from hpc_dl.compress.casts import BFloat16, Cast, Float16, NoCompression
from hpc_dl.compress.device.products import DeviceProducts
from hpc_dl.compress.powersgd import PowerSgd

#: (x, out, left, state, unit, step): see ``AllReduced.rounds``.
Rounds = Callable[
    [torch.Tensor, torch.Tensor, torch.Tensor | None, State, Unit, Step], Iterator[Round]
]


def rounds_of(compressor: Compressor) -> Rounds | None:
    """Return what does the rounds of a compressor on tensors, if there is such a function."""
    kind = type(compressor)
    if isinstance(compressor, Cast) and kind in (NoCompression, Float16, BFloat16):
        return functools.partial(_cast, compressor)
    if isinstance(compressor, PowerSgd) and kind is PowerSgd:
        return functools.partial(_powersgd, compressor)
    return None


def _cast(
    compressor: Cast,
    x: torch.Tensor,
    out: torch.Tensor,
    left: torch.Tensor | None,
    state: State,
    unit: Unit,
    step: Step,
) -> Iterator[Round]:
    narrowed: Any = x.to(torch_view(np.empty(0, compressor.wire_dtype)).dtype, copy=True)
    if left is not None:
        torch.sub(x, narrowed.float(), out=left)
    yield Round(narrowed, "average")
    out.copy_(narrowed)


def _powersgd(
    compressor: PowerSgd,
    x: torch.Tensor,
    out: torch.Tensor,
    left: torch.Tensor | None,
    state: State,
    unit: Unit,
    step: Step,
) -> Iterator[Round]:
    return compressor.rounds_with(DeviceProducts(x.device), x, out, left, state, unit, step)
