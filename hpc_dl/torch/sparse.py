"""All-reduce of sparse gradients (of embeddings): gather the rows that each rank touched."""

import math

import numpy as np
import torch

from hpc_dl.arrays import host_view, torch_view
from hpc_dl.comm import Op
from hpc_dl.compress import Policy
from hpc_dl.compress.rows import Rows, row_format
from hpc_dl.reduce import Traffic
from hpc_dl.reduce.rows import check_op_of_rows, reduce_rows
from hpc_dl.world import Call, Group


def allreduce_sparse(
    p: torch.Tensor, grad: torch.Tensor | None, op: Op, policy: Policy, name: str, group: Group
) -> tuple[torch.Tensor, Traffic]:
    """Combine a COO gradient over the ranks.

    Args:
        p: the parameter; it gives shape and type.
        grad: sparse, dense, or None where this rank has none.
        op: AVERAGE or SUM.
        policy: how rows travel; see ``row_format``.

    Returns:
        The combined gradient, sparse and coalesced, and what this rank sent.

    Raises:
        UnsupportedError: another op.
    """
    check_op_of_rows(op, name)
    if grad is None:
        grad = torch.zeros_like(p)
    grad = (grad if grad.is_sparse else grad.to_sparse(1)).coalesce()
    table, row = p.shape[: grad.sparse_dim()], p.shape[grad.sparse_dim() :]
    values = host_view(grad.values().contiguous().cpu())
    form = row_format(policy, name, p.shape, values.dtype, len(table))
    numbers = np.ravel_multi_index(tuple(host_view(grad.indices().cpu())), table)
    group.agree(Call("sparse_allreduce", name, (None, *row), form.describe(), op.value))
    given = Rows(numbers, values.reshape(len(numbers), math.prod(row)))
    (numbers, values), traffic = reduce_rows(group.comm, given, form, op)
    whole = torch.sparse_coo_tensor(
        torch_view(np.stack(np.unravel_index(numbers, table))),
        torch_view(values).view(-1, *row),
        p.shape,
        check_invariants=False,
        is_coalesced=True,
    )
    return whole.to(p.device), traffic
