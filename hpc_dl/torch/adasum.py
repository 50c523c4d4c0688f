"""Adasum: combine the ranks' steps instead of their gradients.

Maleki et al., "Scaling Distributed Training with Adaptive Summation" (MLSys 2021). Each rank
takes the optimizer's step on its own gradients; the changes are combined by Adasum, which
adds orthogonal ones and averages parallel ones.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch

from hpc_dl.comm import Op
from hpc_dl.errors import UnsupportedError
from hpc_dl.reduce import Traffic
from hpc_dl.torch.memory import memory_of
from hpc_dl.world import Group
from hpc_dl.world.parameters import Described, check_parameters


class AdasumReduction:
    """Combines the steps of one optimizer over the ranks."""

    def __init__(
        self,
        named: Sequence[tuple[str, torch.nn.Parameter]],
        group: Group,
        compressor: Any,
        passes: int,
    ):
        """Check that the communicator has Adasum.

        Raises:
            UnsupportedError: it has not, or the number of ranks is no power of two.
        """
        size = group.comm.size
        if size & (size - 1):
            raise UnsupportedError(
                f"Adasum needs a power of two of ranks; got {size}. Use op=Average"
            )
        if not getattr(group.comm, "has_adasum", False):
            raise UnsupportedError(
                f"Adasum is not available over the communicator {group.comm.name!r}; use "
                "op=Average, or the communicator 'horovod' (HPC_DL_COMM=horovod)"
            )
        self._named, self._group, self._compressor = named, group, compressor
        self.passes = passes
        self._steps, self._bytes = 0, 0
        described = [Described(name, tuple(p.shape), str(p.dtype)) for name, p in named]
        check_parameters(group, described)

    def in_flight(self) -> bool:
        """Return False: nothing starts before the step."""
        return False

    def finish(self) -> None:
        """Do nothing: gradients stay local."""

    @torch.no_grad()
    def step(self, own_step: Callable[[], Any]) -> Any:
        """Take the optimizer's own step and combine the changes of all ranks."""
        starts = [p.detach().clone() for _, p in self._named]
        result = own_step()
        works = []
        for (name, p), start in zip(self._named, starts, strict=True):
            sent, context = self._compressor.compress(p - start)
            memory, dense = memory_of(sent)
            work = self._group.comm.allreduce_async(memory, Op.ADASUM, name=f"adasum.{name}")
            works.append((work, dense, context))
            self._bytes += 2 * (self._group.comm.size - 1) * dense.nbytes // self._group.comm.size
        for (_, p), start, (work, dense, context) in zip(self._named, starts, works, strict=True):
            work.wait()
            p.copy_(start + self._compressor.decompress(dense, context))
        self._steps += 1
        return result

    def abandon(self) -> None:
        """Do nothing: nothing starts before the step."""

    def close(self) -> None:
        """Do nothing: there are no hooks."""

    def traffic(self) -> Traffic:
        """Return steps and bytes so far; the waiting is not told apart."""
        return Traffic(self._steps, self._bytes, 0.0)
