"""Ranks and sizes as operations, which read them when they run and not when they are traced."""

from collections.abc import Callable
from typing import Any

import numpy as np
import tensorflow as tf

from hpc_dl.errors import OptionError
from hpc_dl.tensorflow import host
from hpc_dl.world import (
    ProcessSet,
    current,
    global_process_set,
    local_rank,
    local_size,
    rank,
)


def _scalar(read: Callable[[], int]) -> Any:
    return host.call(lambda: [np.asarray(read(), np.int32)], [], [tf.int32], [[]])[0]


def _find(process_set_id: int) -> ProcessSet:
    known = {0: global_process_set, **current().process_sets}
    if process_set_id not in known:
        raise OptionError.unknown("process_set_id", process_set_id, known)
    return known[process_set_id]


@host.as_written
def size_op(process_set_id: int = 0, name: str | None = None) -> Any:
    """Return the number of ranks of a process set, an int32 scalar."""
    return _scalar(lambda: _find(process_set_id).size())


@host.as_written
def rank_op(name: str | None = None) -> Any:
    """Return the number of this rank, an int32 scalar."""
    return _scalar(rank)


@host.as_written
def local_size_op(name: str | None = None) -> Any:
    """Return the number of ranks on this node, an int32 scalar."""
    return _scalar(local_size)


@host.as_written
def local_rank_op(name: str | None = None) -> Any:
    """Return the number of this rank on its node, an int32 scalar."""
    return _scalar(local_rank)


@host.as_written
def process_set_included_op(process_set_id: int = 0, name: str | None = None) -> Any:
    """Return 1 if this rank is in a process set, else 0, an int32 scalar."""
    return _scalar(lambda: int(_find(process_set_id).included()))
