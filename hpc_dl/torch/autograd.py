"""The gradients of collectives: what flows back is itself a collective.

They follow Horovod: the loss of the job is the average of the ranks' losses, so what a
gather or a broadcast hands out comes back averaged.
"""

from typing import Any

import torch

from hpc_dl.comm import Op
from hpc_dl.torch.memory import fresh_copy, memory_of, summed
from hpc_dl.world import ProcessSet, current
from hpc_dl.world import collectives as shared

Tensor = torch.Tensor


def _reduced(tensor: Tensor, op: Op, scale: float, name: str | None, group: ProcessSet) -> Tensor:
    memory, out = memory_of(fresh_copy(tensor))
    op, divisor = summed(tensor, op, group)
    shared.allreduce_now(memory, op, scale, name, group)
    return out.div_(divisor, rounding_mode="trunc") if divisor > 1 else out


class Allreduce(torch.autograd.Function):
    """Combine over the ranks; the gradient is combined in the same way."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor, op: Op, scale: float, name: Any, group: Any) -> Tensor:
        """Reduce a copy of ``tensor``."""
        ctx.how = op, scale, group
        return _reduced(tensor, op, scale, name, group)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        """Reduce the gradient."""
        op, scale, group = ctx.how
        return _reduced(grads[0], op, scale, None, group), None, None, None, None


class Allgather(torch.autograd.Function):
    """Concatenate the ranks' tensors; each gets its part of the averaged gradient."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor, name: Any, group: ProcessSet) -> Any:
        """Gather, and remember which rows are this rank's."""
        gathered = shared.allgather_start(tensor.detach(), name, group).wait()
        rows = shared.allgather_start(torch.tensor([tensor.shape[0]]), None, group).wait()
        before = int(rows[: group.rank()].sum())
        ctx.part, ctx.group = (before, int(tensor.shape[0])), group
        return gathered

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        """Average the gradient and take this rank's rows."""
        averaged = _reduced(grads[0], Op.AVERAGE, 1.0, None, ctx.group)
        return averaged.narrow(0, *ctx.part), None, None


class Broadcast(torch.autograd.Function):
    """Hand out the root's tensor; the averaged gradient goes to the root alone."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor, root: int, name: Any, group: ProcessSet) -> Tensor:
        """Broadcast into a copy of ``tensor``."""
        ctx.is_root, ctx.group = current().comm.rank == root, group
        memory, out = memory_of(fresh_copy(tensor))
        shared.broadcast_start(memory, root, name, group).wait()
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        """Average the gradient; other ranks than the root get zero."""
        averaged = _reduced(grads[0], Op.AVERAGE, 1.0, None, ctx.group)
        return averaged if ctx.is_root else torch.zeros_like(averaged), None, None, None


class Alltoall(torch.autograd.Function):
    """Exchange parts; the gradient goes back the way the parts came."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor, splits: Any, name: Any, group: ProcessSet) -> Any:
        """Exchange and remember how many rows came from each rank."""
        output, received = shared.alltoall_start(tensor.detach(), splits, name, group).wait()
        ctx.received, ctx.group = received, group
        ctx.mark_non_differentiable(received)
        return output, received

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        """Send each rank the gradient of what it sent."""
        returned, _ = shared.alltoall_start(grads[0], ctx.received, None, ctx.group).wait()
        return returned, None, None, None


class Reducescatter(torch.autograd.Function):
    """Combine and keep a part; the gradient of the whole is gathered from the parts."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor, op: Op, scale: float, name: Any, group: Any) -> Any:
        """Reduce and scatter."""
        ctx.factor = scale * (group.size() if op is Op.SUM else 1.0)
        ctx.group = group
        return shared.reducescatter_start(tensor.detach(), op, scale, name, group).wait()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        """Gather the scaled gradients of all parts."""
        whole = shared.allgather_start(grads[0] * ctx.factor, None, ctx.group).wait()
        return whole, None, None, None, None


def apply(function: Any, *args: Any) -> Any:
    """Apply one of the functions above; torch's own ``apply`` has no types."""
    return function.apply(*args)
