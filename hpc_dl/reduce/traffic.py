"""What reduction has cost: bytes on the wire, and seconds of waiting."""

from collections.abc import Iterable
from typing import NamedTuple


class Traffic(NamedTuple):
    """What a reducer has done since it was made."""

    steps: int
    bytes_sent: int
    """Bytes this rank put on the wire: 2 (n - 1) / n of a bucket, or what compression sent."""
    wait_seconds: float
    """Seconds in which the training thread waited for reductions."""
    bytes_dense: int = 0
    """Bytes that the same gradients would have been without compression: all-reduced, or for
    sparse ones, rows as they are with int64 numbers."""


def total(parts: Iterable[Traffic]) -> Traffic:
    """Add up what the reducers of one optimizer have done in the same steps."""
    listed = [*parts, Traffic(0, 0, 0.0)]
    return Traffic(
        max(part.steps for part in listed),
        sum(part.bytes_sent for part in listed),
        sum(part.wait_seconds for part in listed),
        sum(part.bytes_dense for part in listed),
    )


def bytes_of_allreduce(nbytes: int, size: int) -> int:
    """Return what each of ``size`` ranks sends to reduce ``nbytes``, in a ring or otherwise."""
    return 2 * (size - 1) * nbytes // size
