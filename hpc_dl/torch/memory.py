"""The memory of a torch tensor, as communicators take it."""

from typing import Any

import torch

from hpc_dl.arrays import host_view, is_device_tensor
from hpc_dl.comm import Op
from hpc_dl.world import ProcessSet


def memory_of(tensor: torch.Tensor) -> tuple[Any, torch.Tensor]:
    """Return memory of ``tensor`` to reduce in, and the contiguous tensor that has it.

    The memory is a NumPy array, or for a CUDA tensor the tensor itself. Both are of a copy
    where ``tensor`` is not contiguous.
    """
    dense = tensor.detach()
    if not dense.is_contiguous():
        dense = dense.contiguous()
    return (dense if is_device_tensor(dense) else host_view(dense)), dense


def summed(tensor: torch.Tensor, op: Op, process_set: ProcessSet) -> tuple[Op, int]:
    """Return the op to use for ``op``, and what to divide its result by.

    The average of whole numbers is taken as Horovod takes it: their sum, divided towards zero.
    """
    if op is Op.AVERAGE and not (tensor.is_floating_point() or tensor.is_complex()):
        return Op.SUM, process_set.size()
    return op, 1


def fresh_copy(tensor: torch.Tensor) -> torch.Tensor:
    """Return a contiguous copy without a gradient."""
    return tensor.detach().clone(memory_format=torch.contiguous_format)
