"""Where each parameter lies in which fusion bucket.

Gradients are reduced in buckets: few large transfers instead of many small ones
(Li et al., "PyTorch Distributed", VLDB 2020, section 3.2.3).
"""

from collections.abc import Hashable, Mapping, Sequence
from typing import NamedTuple

import numpy as np

_NO_KINDS: Mapping[str, Hashable] = {}

#: Bytes to which offsets are aligned: one cache line, and any number type.
ALIGNMENT = 64


class Parameter(NamedTuple):
    """A parameter's name, shape and the type in which its gradient travels."""

    name: str
    shape: tuple[int, ...]
    dtype: np.dtype[np.generic]

    @property
    def size(self) -> int:
        """The number of elements."""
        return int(np.prod(self.shape, dtype=np.int64))

    @property
    def nbytes(self) -> int:
        """The number of bytes on the wire."""
        return self.size * self.dtype.itemsize


class Bucket(NamedTuple):
    """Parameters of one type that travel together; offsets are in elements."""

    dtype: np.dtype[np.generic]
    parameters: tuple[Parameter, ...]
    offsets: tuple[int, ...]
    size: int

    @property
    def nbytes(self) -> int:
        """The bytes of the bucket, padding included."""
        return self.size * self.dtype.itemsize


class Layout(NamedTuple):
    """All buckets, in the order in which they are reduced."""

    buckets: tuple[Bucket, ...]

    @property
    def nbytes(self) -> int:
        """The bytes of all buckets."""
        return sum(bucket.nbytes for bucket in self.buckets)

    def place(self) -> dict[str, tuple[int, int]]:
        """Map each name to (bucket number, offset in elements)."""
        return {
            parameter.name: (number, offset)
            for number, bucket in enumerate(self.buckets)
            for parameter, offset in zip(bucket.parameters, bucket.offsets, strict=True)
        }


def _bucket(parameters: Sequence[Parameter]) -> Bucket:
    dtype = parameters[0].dtype
    step = ALIGNMENT // dtype.itemsize
    offsets, end = [], 0
    for parameter in parameters:
        offsets.append(end)
        end += -(-parameter.size // step) * step
    return Bucket(dtype, tuple(parameters), tuple(offsets), end)


def plan(
    parameters: Sequence[Parameter],
    capacity: int,
    groups: Sequence[Sequence[str]] = (),
    kinds: Mapping[str, Hashable] = _NO_KINDS,
) -> Layout:
    """Cut parameters into buckets.

    Args:
        parameters: in the order in which their gradients become ready.
        capacity: bytes after which a bucket is closed; a larger parameter has its own.
        groups: names that must travel together (and with nothing else); a group with
            several types becomes one bucket for each type.
        kinds: by name, what parameters of a bucket must have in common beside their type.

    Returns:
        Buckets of one type each. The order is that of the last parameter of each bucket,
        so that a bucket is never in front of one that is ready sooner.
    """
    group_of = {name: number for number, group in enumerate(groups) for name in group}
    open_buckets: dict[Hashable, list[int]] = {}
    closed: list[list[int]] = []
    for index, parameter in enumerate(parameters):
        group = group_of.get(parameter.name)
        key = (parameter.dtype.str, parameter.dtype.name, group, kinds.get(parameter.name))
        members = open_buckets.setdefault(key, [])
        filled = sum(parameters[i].nbytes for i in members)
        if members and group is None and filled + parameter.nbytes > capacity:
            closed.append(members)
            members = open_buckets[key] = []
        members.append(index)
    closed.extend(open_buckets.values())
    closed.sort(key=lambda members: members[-1])
    return Layout(tuple(_bucket([parameters[i] for i in members]) for members in closed))
