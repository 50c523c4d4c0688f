"""Which reduction is defined for which type of numbers."""

from typing import Any

import numpy as np

from hpc_dl.arrays import BFLOAT16
from hpc_dl.comm.protocol import Op
from hpc_dl.errors import UnsupportedError


def check_number_type(dtype: np.dtype[Any], op: Op) -> bool:
    """Refuse a type that ``op`` is not defined for, before any rank waits for another.

    Returns:
        Whether values of this type can be divided: whether they have an average.

    Raises:
        UnsupportedError: the message lists what is defined.
    """
    if dtype.kind == "b":
        if op not in (Op.MIN, Op.MAX):
            raise UnsupportedError(
                f"{op.value} is not defined for bool; valid ops: min (all), max (any). To count, "
                "convert to an integer type"
            )
        return False
    if dtype.kind not in "iufc" and dtype != BFLOAT16:
        raise UnsupportedError(
            f"{op.value} is not defined for {dtype}; valid types: bool (min, max), integers, "
            "floats, bfloat16, complex (sum, average, product)"
        )
    if not dtype.isnative:
        raise UnsupportedError(
            f"{dtype.str} is not in this machine's byte order; pass "
            "x.astype(x.dtype.newbyteorder('='))"
        )
    if dtype.kind == "c" and op not in (Op.SUM, Op.AVERAGE, Op.PRODUCT):
        raise UnsupportedError(
            f"{op.value} is not defined for {dtype}; valid ops: sum, average, product"
        )
    if dtype.kind in "iu" and op is Op.ADASUM:
        raise UnsupportedError(
            f"adasum is not defined for {dtype}; valid ops: sum, min, max, product"
        )
    return dtype.kind not in "iu"
