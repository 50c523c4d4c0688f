"""All-reduce of sparse gradients (of embeddings): gather the rows that each rank touched."""

import torch

from hpc_dl.arrays import host_view, torch_view
from hpc_dl.comm import Op
from hpc_dl.errors import UnsupportedError
from hpc_dl.world import Call, Group


def allreduce_sparse(
    p: torch.Tensor, grad: torch.Tensor | None, op: Op, name: str, group: Group
) -> tuple[torch.Tensor, int]:
    """Combine a COO gradient over the ranks.

    Args:
        p: the parameter; it gives shape and type.
        grad: sparse, dense, or None where this rank has none.
        op: AVERAGE or SUM.

    Returns:
        The combined gradient, sparse and coalesced, and the bytes this rank sent.

    Raises:
        UnsupportedError: another op.
    """
    if op not in (Op.AVERAGE, Op.SUM):
        raise UnsupportedError(
            f"sparse gradients ({name!r}) can be averaged or summed, not {op.value}; pass "
            "sparse_as_dense=True"
        )
    comm = group.comm
    if grad is None:
        grad = torch.zeros_like(p)
    grad = (grad if grad.is_sparse else grad.to_sparse(1)).coalesce()
    rows = grad.indices().t().contiguous().cpu()
    values = grad.values().contiguous().cpu()
    shape = (None, *values.shape[1:])
    group.agree(Call("sparse_allreduce", name, shape, str(p.dtype), op.value))
    all_rows = comm.allgather(host_view(rows))
    all_values = comm.allgather(host_view(values))
    indices = torch.cat([torch_view(part) for part in all_rows]).t()
    combined = torch.cat([torch_view(part) for part in all_values])
    if op is Op.AVERAGE:
        combined = combined / comm.size
    whole = torch.sparse_coo_tensor(indices, combined, p.shape, check_invariants=False)
    sent = (comm.size - 1) * (rows.nbytes + values.nbytes)
    return whole.coalesce().to(p.device), sent
