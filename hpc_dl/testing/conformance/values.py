"""Inputs whose reduction is known exactly, from the rank and the number of ranks."""

from typing import Any

import numpy as np

from hpc_dl.arrays import BFLOAT16
from hpc_dl.comm import Op
from hpc_dl.comm.protocol import Array

FLOATS = tuple(map(np.dtype, (np.float32, np.float64)))
HALVES = (np.dtype(np.float16), BFLOAT16)
INTEGERS = tuple(np.dtype(f"{sign}int{bits}") for sign in ("", "u") for bits in (8, 16, 32, 64))
COMPLEX = tuple(map(np.dtype, (np.complex64, np.complex128)))
BOOL = np.dtype(np.bool_)
REAL = (*FLOATS, *HALVES, *INTEGERS)
ALL = (*REAL, *COMPLEX, BOOL)

#: Lengths and shapes: empty, one, not divisible by most sizes, and not 1-D.
SHAPES: tuple[tuple[int, ...], ...] = ((0,), (1,), (), (7,), (1000,), (2, 3, 5), (3, 0, 2), (65, 3))

Dtype = np.dtype[Any]


def values(shape: tuple[int, ...], dtype: Dtype, rank: int) -> Array:
    """Return 0, 1 and 2 (False and True) in turn, shifted by the rank.

    The sum over up to 60 ranks is exact in every type.
    """
    index = np.arange(int(np.prod(shape)), dtype=np.int64).reshape(shape)
    if dtype == BOOL:
        return np.asarray((index + rank) % 3 == 0)
    if dtype.kind == "c":
        return np.asarray((index + rank) % 3 + 1j * ((index + 2 * rank) % 3), dtype)
    return np.asarray((index + 2 * rank) % 3, dtype)


def factors(shape: tuple[int, ...], dtype: Dtype, rank: int, size: int) -> Array:
    """Return ones and twos of which no more than three meet: their product fits every type."""
    index = np.arange(int(np.prod(shape)), dtype=np.int64).reshape(shape)
    return np.asarray(1 + ((index + rank) % size < 3), dtype)


def inputs(op: Op, shape: tuple[int, ...], dtype: Dtype, rank: int, size: int) -> Array:
    """Return what ``rank`` contributes to a reduction."""
    return factors(shape, dtype, rank, size) if op is Op.PRODUCT else values(shape, dtype, rank)


def wide(dtype: Dtype) -> Dtype:
    """Return a type in which results for ``dtype`` are exact."""
    if dtype.kind == "b":
        return dtype
    return np.dtype({"c": np.complex128, "i": np.int64, "u": np.uint64}.get(dtype.kind, np.float64))


def expected(op: Op, shape: tuple[int, ...], dtype: Dtype, size: int) -> Array:
    """Return the reduction of everyone's ``inputs``, in a wide type."""
    stack = np.stack([inputs(op, shape, dtype, r, size).astype(wide(dtype)) for r in range(size)])
    if op is Op.AVERAGE:
        return np.asarray(stack.mean(axis=0))
    reduce = {Op.SUM: np.add, Op.MIN: np.minimum, Op.MAX: np.maximum, Op.PRODUCT: np.multiply}[op]
    return np.asarray(reduce.reduce(stack, axis=0))


def around(thresholds: tuple[int, ...], dtype: Dtype) -> list[int]:
    """Return lengths just below, at and just above each number of bytes."""
    return sorted({t // dtype.itemsize + d for t in thresholds for d in (-1, 0, 1)})


def noise(length: int, dtype: Dtype, rank: int) -> Array:
    """Return normally distributed numbers, another series on each rank."""
    return np.random.default_rng([rank, length]).standard_normal(length).astype(dtype)
