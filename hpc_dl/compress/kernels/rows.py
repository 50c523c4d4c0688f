"""Add rows to rows."""

from typing import Any

import numpy as np

from hpc_dl.compress.base import Array
from hpc_dl.compress.kernels.compile import Kernel


def _add_rows(places: Any, values: Any, out: Any) -> None:
    width = values.shape[1]
    for i in range(len(places)):
        row, added = out[places[i]], values[i]
        for j in range(width):
            row[j] += added[j]


def _add_rows_reference(places: Array, values: Array, out: Array) -> None:
    np.add.at(out, places, values)


#: (places, values, out): add each row of ``values`` to the row of ``out`` at its place.
add_rows = Kernel(_add_rows, _add_rows_reference)
