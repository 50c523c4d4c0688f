"""Rows of a table, such as the gradient of an embedding has, and how they travel.

The rows of a payload are in order and each is there once. Their numbers come first, then the
scales of int8, then the values; how many there are follows from the length.
"""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from hpc_dl.compress.base import Array, Bytes
from hpc_dl.compress.casts import Cast
from hpc_dl.compress.kernels import levels
from hpc_dl.compress.kernels.casts import narrow, widen
from hpc_dl.compress.kernels.rows import add_rows
from hpc_dl.compress.maxmin import Int8
from hpc_dl.compress.rules import Policy

_FLOAT32, _INT8 = np.dtype(np.float32), np.dtype(np.int8)


class Rows(NamedTuple):
    """Some rows of a table."""

    numbers: NDArray[np.int64]
    """Ascending, each once."""
    values: Array
    """Of shape (rows, width)."""


def summed(numbers: Array, values: Array) -> Rows:
    """Add up rows of the same number; halves are added in float32.

    Args:
        values: of shape (rows, width).
    """
    unique, places = np.unique(numbers, return_inverse=True)
    out = np.zeros((len(unique), values.shape[1]), _wide(values.dtype))
    add_rows(places.reshape(-1), np.ascontiguousarray(values, out.dtype), out)
    return Rows(unique.astype(np.int64, copy=False), out)


class RowFormat(NamedTuple):
    """How the rows of one table travel; see ``row_format``."""

    width: int
    """Values of a row."""
    dtype: np.dtype[Any]
    """Of the values themselves."""
    wire: np.dtype[Any]
    """Of the values on the wire; int8 comes with a float32 scale for each row."""
    number: np.dtype[Any]
    """Of the numbers on the wire."""

    @property
    def row_bytes(self) -> int:
        """The bytes of a row on the wire."""
        return self.number.itemsize + _value_bytes(self.width, self.wire)

    @property
    def plain_row_bytes(self) -> int:
        """The bytes of a row as it is: its values, and an int64."""
        return 8 + _value_bytes(self.width, self.dtype)

    def describe(self) -> str:
        """Say what travels."""
        return f"{self.dtype.name} as {self.wire.name} by {self.number.name}"

    def encode(self, rows: Rows) -> Bytes:
        """Encode rows; a value that is not finite makes that of int8 a row of NaN."""
        payload = np.empty(len(rows.numbers) * self.row_bytes, np.uint8)
        numbers, scales, values = self._cut(payload)
        numbers[:] = rows.numbers
        if self.wire == _INT8:
            given = np.ascontiguousarray(rows.values, np.float32)
            bad = np.logical_not(np.isfinite(given).all(axis=1))
            if bad.any():
                given = np.where(bad[:, None], np.float32(0), given)
            nothing, flat = np.empty(0, np.float32), given.reshape(-1)
            middles, key, kind = np.empty_like(scales), np.uint32(0), levels.MAX
            levels.encode(
                flat, nothing, False, self.width, 8, kind, False, key, middles, scales, values
            )
            scales[bad] = np.nan
        elif rows.values.dtype == _FLOAT32 and self.wire.itemsize == 2:
            values[:] = narrow(np.ascontiguousarray(rows.values).reshape(-1), self.wire)
        else:
            with np.errstate(over="ignore"):
                values[:] = rows.values.reshape(-1)
        return payload

    def decode(self, payload: Bytes) -> Rows:
        """Return the rows; halves and int8 as float32."""
        numbers, scales, values = self._cut(payload)
        if self.wire.itemsize > 2:
            out = values
        else:
            out = np.empty(len(values), np.float32)
            if self.wire == _INT8:
                middles = np.zeros(len(numbers), np.float32)
                levels.decode(middles, scales.copy(), values, self.width, 8, levels.MAX, out, False)
            else:
                widen(values, out)
        return Rows(numbers.astype(np.int64), out.reshape(-1, self.width))

    def _cut(self, payload: Bytes) -> tuple[Array, Array, Array]:
        """View the numbers, the scales and the values."""
        count = len(payload) // self.row_bytes
        first = count * self.number.itemsize
        second = first + (4 * count if self.wire == _INT8 else 0)
        # Codes of ``levels`` are not negative.
        kind = np.dtype(np.uint8) if self.wire == _INT8 else self.wire
        return (
            payload[:first].view(self.number),
            payload[first:second].view(np.float32),
            payload[second:].view(kind),
        )


def row_format(
    policy: Policy, name: str, shape: Sequence[int], dtype: Any, sparse_dims: int = 1
) -> RowFormat:
    """Say how a table's rows travel: as the policy's cast or int8 says, otherwise as they are.

    Args:
        shape: of the table.
        sparse_dims: its first dimensions that number the rows.
    """
    dtype = np.dtype(dtype)
    width = math.prod(shape[sparse_dims:])
    travel = policy.travel(name, shape, dtype)
    wire = travel.dtype
    if travel.scheme is not None:
        compressor, wire = travel.scheme.compressor, dtype
        if isinstance(compressor, Cast):
            wire = compressor.wire_dtype
        elif isinstance(compressor, Int8):
            wire = _INT8
    if _value_bytes(width, wire) >= _value_bytes(width, dtype):
        wire = dtype
    fits = math.prod(shape[:sparse_dims]) <= 2**31
    return RowFormat(width, dtype, wire, np.dtype(np.int32 if fits else np.int64))


def _value_bytes(width: int, wire: np.dtype[Any]) -> int:
    return width * wire.itemsize + (4 if wire == _INT8 else 0)


def _wide(dtype: np.dtype[Any]) -> np.dtype[Any]:
    return _FLOAT32 if dtype.itemsize <= 2 else dtype
