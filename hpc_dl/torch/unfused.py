"""Reduction through a compressor of the user's own: each gradient by itself, after backward."""

from collections.abc import Sequence
from typing import Any

import torch

from hpc_dl.comm import Op
from hpc_dl.reduce import Traffic
from hpc_dl.torch.memory import memory_of
from hpc_dl.world import Call, Group
from hpc_dl.world.parameters import Described, check_parameters


class UnfusedReduction:
    """Compress, all-reduce and decompress the gradients one by one.

    What a compressor sends need not be of the gradient's type or shape, so it cannot lie in
    a bucket that is planned beforehand.
    """

    def __init__(
        self,
        named: Sequence[tuple[str, torch.nn.Parameter]],
        group: Group,
        compressor: Any,
        op: Op,
        passes: int,
    ):
        self._named, self._group, self._compressor, self._op = named, group, compressor, op
        self.passes = passes
        self._steps, self._bytes = 0, 0
        described = [Described(name, tuple(p.shape), str(p.dtype)) for name, p in named]
        check_parameters(group, described)

    def in_flight(self) -> bool:
        """Return False: nothing starts before ``finish``."""
        return False

    def finish(self) -> None:
        """Reduce all gradients; a missing one counts as zeros."""
        comm = self._group.comm
        for name, p in self._named:
            if p.grad is None:
                p.grad = torch.zeros_like(p)
            sent, context = self._compressor.compress(p.grad)
            memory, dense = memory_of(sent)
            shape, dtype = tuple(dense.shape), str(memory.dtype)
            self._group.agree(Call("allreduce", name, shape, dtype, self._op.value))
            comm.allreduce(memory, self._op)
            p.grad.copy_(self._compressor.decompress(dense, context))
            self._bytes += 2 * (comm.size - 1) * dense.nbytes // comm.size
        self._steps += 1

    def abandon(self) -> None:
        """Do nothing: nothing starts before the step."""

    def close(self) -> None:
        """Do nothing: there are no hooks."""

    def traffic(self) -> Traffic:
        """Return steps and bytes so far; the waiting is not told apart."""
        return Traffic(self._steps, self._bytes, 0.0)
