"""Make sure that all ranks train the same parameters."""

import json
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import xxhash

from hpc_dl.errors import MismatchError
from hpc_dl.world.group import Call, Group


class Described(NamedTuple):
    """A parameter as other ranks are told of it."""

    name: str
    shape: tuple[int, ...]
    dtype: str

    def __str__(self) -> str:
        return f"{self.name!r} {tuple(self.shape)} {self.dtype}"


def check_parameters(group: Group, parameters: Sequence[Described]) -> str:
    """Compare the names, shapes and types of parameters over the ranks.

    Returns:
        A digest of them, the same on all ranks.

    Raises:
        MismatchError: on all ranks; names the first parameters that differ, of both ranks.
    """
    comm, text = group.comm, json.dumps(parameters)
    group.agree(Call("parameters", "parameters"))
    digest = xxhash.xxh3_64_intdigest(text.encode())
    rows = comm.exchange(np.array([digest], np.uint64).view(np.int64))
    if (rows == rows[0]).all():
        return f"{digest:016x}"
    texts = comm.allgather(np.frombuffer(text.encode(), np.uint8))
    everyone = [
        [Described(name, tuple(shape), dtype) for name, shape, dtype in json.loads(t.tobytes())]
        for t in texts
    ]
    other = next(rank for rank, row in enumerate(rows) if row[0] != rows[0][0])
    raise MismatchError(_difference(everyone[0], everyone[other], other))


def _difference(first: list[Described], second: list[Described], rank: int) -> str:
    for index, (a, b) in enumerate(zip(first, second, strict=False)):
        if a != b:
            return (
                f"ranks have different parameters: number {index} is {a} on rank 0 and {b} on "
                f"rank {rank}. Build the same model, in the same order, on all ranks"
            )
    longer, names = (first, "rank 0") if len(first) > len(second) else (second, f"rank {rank}")
    extra = longer[min(len(first), len(second))]
    return (
        f"ranks have different numbers of parameters: {len(first)} on rank 0, {len(second)} on "
        f"rank {rank}; {extra} is only on {names}. Build the same model on all ranks"
    )
