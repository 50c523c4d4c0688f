"""What one parameter owes: an entry of the state of compression."""

import numpy as np

from hpc_dl.arrays import Parameter
from hpc_dl.comm.protocol import Array
from hpc_dl.compress import Policy, Sparsifier, Unit
from hpc_dl.errors import OptionError
from hpc_dl.reduce import Reducer, Saved

State = dict[str, Array]

#: Parts of a state that are those of all parameters.
COMMON = ("step", "guard")


def settled(state: State, parameter: Parameter, policy: Policy, size: int) -> State:
    """Return a state in which what this rank owes of sums is part of its residual.

    Args:
        policy: under which it came about.
        size: of the world.
    """
    server, scheme = state.get("server"), policy.travel(*parameter).scheme
    if server is None or scheme is None or not server.any():
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
    compression = reducer.compression
    if compression is None:
        return []
    return [
        parameter.name
        for number, bucket in enumerate(reducer.layout.buckets)
        if compression.covers(number)
        for parameter in bucket.parameters
    ]


def state_of(reducer: Reducer) -> Saved:
    """Return what a reducer keeps between steps, by parameter; copies."""
    return {} if reducer.compression is None else reducer.compression.state_dict()


def fits(name: str, key: str, value: Array, place: Array) -> bool:
    """Tell whether a saved array goes to a place.

    Raises:
        OptionError: it is of a parameter of another size.
    """
    if key in COMMON or key.startswith("state."):
        return value.shape == place.shape
    if value.size != place.size:
        raise OptionError(
            f"compression state of {name!r}: {key} has {value.size} values, the parameter has "
            f"{place.size}; load the state of the same model"
        )
    return True


def nothing_in(places: State) -> State:
    """Return the state of a parameter that owes nothing."""
    kept = (*COMMON, "state.")
    return {k: np.zeros_like(v) for k, v in places.items() if not k.startswith(kept)}
