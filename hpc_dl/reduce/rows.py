"""Reduce sparse gradients: gather the rows that each rank touched."""

import numpy as np

from hpc_dl.comm import Communicator, Op
from hpc_dl.compress.rows import RowFormat, Rows, summed
from hpc_dl.errors import UnsupportedError
from hpc_dl.reduce.traffic import Traffic


def check_op_of_rows(op: Op, name: str) -> None:
    """Refuse what needs the rows that are not there.

    Raises:
        UnsupportedError: another op than AVERAGE and SUM.
    """
    if op not in (Op.AVERAGE, Op.SUM):
        raise UnsupportedError(
            f"sparse gradients ({name!r}) can be averaged or summed, not {op.value}; pass "
            "sparse_as_dense=True"
        )


def reduce_rows(
    comm: Communicator, rows: Rows, form: RowFormat, op: Op = Op.AVERAGE
) -> tuple[Rows, Traffic]:
    """Combine rows over the ranks; all call this alike, with any rows.

    Args:
        op: AVERAGE or SUM.

    Returns:
        The rows of all ranks, the same bytes on each, and what has been sent.
    """
    payload = form.encode(rows)
    parts = [form.decode(part) for part in comm.allgather(payload)]
    numbers, values = zip(*parts, strict=True)
    total = summed(np.concatenate(numbers), np.concatenate(values))
    combined = total.values / comm.size if op is Op.AVERAGE else total.values
    others = comm.size - 1
    traffic = Traffic(
        0, others * len(payload), 0.0, others * len(rows.numbers) * form.plain_row_bytes
    )
    return Rows(total.numbers, combined.astype(form.dtype, copy=False)), traffic
