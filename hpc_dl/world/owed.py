"""What one parameter owes: an entry of the state of compression."""

import math
from collections.abc import Collection
from typing import Any

import numpy as np

from hpc_dl.arrays import Parameter, from_host
from hpc_dl.comm.protocol import Array
from hpc_dl.compress import Scheme, Sparsifier, Unit
from hpc_dl.errors import OptionError
from hpc_dl.reduce import Reducer, Saved
from hpc_dl.reduce.compression import RESHARDED

State = dict[str, Array]

#: Parts of a state that are those of all parameters.
COMMON = ("step", "guard", RESHARDED)


def settled(reducer: Reducer, names: Collection[str], size: int) -> Saved:
    """Return states in which what this rank owes of sums is part of its residual.

    For those lie elsewhere in other buckets.

    Args:
        names: of parameters that the reducer compresses.
        size: of the world.
    """
    if reducer.compression is None or not names:
        return {}
    parameters, schemes = parameters_of(reducer), reducer.compression.schemes
    return {
        name: _settled(state, parameters[name], schemes[name], size)
        for name, state in reducer.compression.state_dict(names).items()
    }


def _settled(state: State, parameter: Parameter, scheme: Scheme, size: int) -> State:
    server = state.get("server")
    if server is None or not server.any():
        return state
    owed = server * np.float32(size)
    if isinstance(scheme.compressor, Sparsifier):  # They may be coefficients.
        given, owed = owed, np.empty_like(owed)
        scheme.compressor.restore(given, owed, Unit.single(parameter.name, parameter.shape))
    return {**state, "residual": state["residual"] + owed, "server": np.zeros_like(server)}


def parameters_of(reducer: Reducer) -> dict[str, Parameter]:
    """Return the parameters of a reducer's buckets by name."""
    return {p.name: p for bucket in reducer.layout.buckets for p in bucket.parameters}


def compressed_by(reducer: Reducer) -> list[str]:
    """Return the names of the parameters that a reducer compresses."""
    return [] if reducer.compression is None else list(reducer.compression.schemes)


def left_dense_by(reducer: Reducer) -> list[str]:
    """Return the names of those that it all-reduces, in their order."""
    covered = set(compressed_by(reducer))
    return [name for name in parameters_of(reducer) if name not in covered]


def fits(name: str, key: str, value: Array, place: Array | None) -> bool:
    """Tell whether a saved array goes to a place, if there is one.

    Raises:
        OptionError: it is of a parameter of another size.
    """
    if place is None:
        return key == RESHARDED
    if key in COMMON or key.startswith("state."):
        return value.shape == place.shape
    check_size(name, key, value, place.size)
    return True


def check_size(name: str, key: str, value: Array, size: int) -> None:
    """Refuse a saved array of another size than the parameter's.

    Raises:
        OptionError: it is.
    """
    if value.size != size:
        raise OptionError(
            f"compression state of {name!r}: {key} has {value.size} values, the parameter has "
            f"{size}; load the state of the same model"
        )


def residual_of(state: State, result: Any) -> Array:
    """Return a copy of what is owed of a gradient, flat float32; zeros for nothing.

    Args:
        result: of a reduction, of any framework.
    """
    owed = state.get("residual")
    size = math.prod(result.shape)
    return np.zeros(size, np.float32) if owed is None else np.array(owed, np.float32)


def is_finite(result: Any) -> bool:
    """Tell whether a result of a reduction is finite."""
    return bool(abs(result).max() < math.inf)


def add_to(result: Any, owed: Array) -> None:
    """Add what is owed to a result of a reduction."""
    result[...] = result + from_host(owed.reshape(tuple(result.shape)), result)


def nothing_in(places: State) -> State:
    """Return the state of a parameter that owes nothing."""
    kept = (*COMMON, "state.")
    return {k: np.zeros_like(v) for k, v in places.items() if not k.startswith(kept)}
