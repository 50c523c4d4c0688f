"""Comparing arrays byte by byte."""

from itertools import zip_longest
from typing import Any

import numpy as np


def assert_same_bytes(got: Any, wanted: Any, note: str = "") -> None:
    """Raise `AssertionError` where arrays differ, naming the first byte that does.

    Args:
        got: An array, bytes, or a list of these.
        wanted: What `got` should be.
        note: What is compared, for the message.

    ``assert a.tobytes() == b.tobytes()`` says the same, but pytest explains a failure of it with
    a line-by-line comparison, which takes minutes for large arrays where ``CI`` is set.
    """
    for i, (a, b) in enumerate(zip_longest(_listed(got), _listed(wanted))):
        about = f"{note}: array {i}" if isinstance(got, list) else note or "array"
        if a is None or b is None:
            raise AssertionError(f"{about} is there once only")
        x, y = (np.frombuffer(_bytes(part), np.uint8) for part in (a, b))
        if len(x) != len(y):
            raise AssertionError(f"{about}: {len(x)} bytes instead of {len(y)}")
        differ = np.flatnonzero(x != y)
        if len(differ):
            first = differ[0]
            raise AssertionError(
                f"{about}: {len(differ)} of {len(x)} bytes differ; byte {first} is {x[first]} "
                f"instead of {y[first]}"
            )


def _listed(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]


def _bytes(part: Any) -> bytes:
    return part if isinstance(part, bytes) else np.asarray(part).tobytes()
