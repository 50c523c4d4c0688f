"""One short text that says which weights a run ended with."""

import hashlib
from collections.abc import Iterable
from typing import Any

import numpy as np


def weights_digest(named: Iterable[tuple[str, Any]]) -> str:
    """Return the SHA-256, in hex, of the parameters' bytes, one after the other.

    Args:
        named: (name, array) in the model's order; the names do not count.

    >>> weights_digest([("w", np.zeros(2, np.float32))])[:8]
    'af5570f5'
    """
    digest = hashlib.sha256()
    for _, array in named:
        digest.update(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)
    return digest.hexdigest()
