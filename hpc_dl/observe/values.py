"""Turn what training code measures into what JSON can hold."""

import math
import os
from collections.abc import Mapping
from typing import Any

import numpy as np

from hpc_dl.errors import OptionError


def plain(value: Any, name: str = "value") -> Any:
    """Return ``value`` in JSON's types; numbers that JSON lacks (NaN, infinities) become None.

    Args:
        value: a number, string, None or path, an array or tensor of one element, or mappings
            and lists of those.
        name: what an error calls it.

    Raises:
        OptionError: it is something else.

    >>> plain({"loss": float("nan"), "epoch": 3})
    {'loss': None, 'epoch': 3}
    """
    if value is None or isinstance(value, str | bool | int):
        return value
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else None
    if isinstance(value, np.generic):
        return plain(value.item(), name)
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if isinstance(value, Mapping):
        return {str(key): plain(item, f"{name}.{key}") for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item, f"{name}[{i}]") for i, item in enumerate(value)]
    return plain(_single(value, name), name)


def _single(value: Any, name: str) -> Any:
    """Take the number out of an array or tensor of one element."""
    shape = getattr(value, "shape", None)
    if shape is not None and math.prod(shape) == 1:
        return np.asarray(value.detach().cpu() if hasattr(value, "detach") else value).item()
    described = type(value).__name__ if shape is None else f"an array of shape {tuple(shape)}"
    raise OptionError(
        f"{name} is {described}; give a number, a string, None, an array of one element, or "
        "mappings and lists of those"
    )
