"""Give all ranks the same variables, or the same Python objects, before training."""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import tensorflow as tf

from hpc_dl.comm.protocol import Array
from hpc_dl.errors import UnsupportedError
from hpc_dl.tensorflow import host
from hpc_dl.world import ProcessSet, global_process_set
from hpc_dl.world import objects as shared
from hpc_dl.world.collectives import broadcast_start, pack, unpack
from hpc_dl.world.parameters import Described, check_parameters


@host.as_written
def broadcast_variables(
    variables: Iterable[Any],
    root_rank: int,
    process_set: ProcessSet = global_process_set,
    inplace: bool = False,
) -> None:
    """Overwrite variables, in place, with those of rank ``root_rank``.

    Args:
        variables: TensorFlow or Keras variables, in the same order on all ranks.
        inplace: accepted for Horovod's sake; the variables keep their memory either way.

    Raises:
        MismatchError: on all ranks, if names, shapes or types differ between them.
    """
    targets = list(variables)
    received = _broadcast([_native(v) for v in targets], root_rank, None, process_set)
    for variable, value in zip(targets, received, strict=True):
        _native(variable).assign(value)


@host.as_written
def broadcast_(
    variables: Sequence[Any],
    root_rank: int,
    name: str | None = None,
    process_set: ProcessSet = global_process_set,
) -> list[Any]:
    """Overwrite variables with those of rank ``root_rank``; return their new values."""
    natives = [_native(v) for v in variables]
    received = _broadcast(natives, root_rank, name, process_set)
    for variable, value in zip(natives, received, strict=True):
        variable.assign(value)
    return received


def _native(variable: Any) -> Any:
    """Return the TensorFlow variable inside a Keras variable."""
    return variable if isinstance(variable, tf.Variable) else variable.value


def _broadcast(
    variables: Sequence[Any], root_rank: int, name: str | None, process_set: ProcessSet
) -> list[Any]:
    described = [Described(v.name, tuple(v.shape), v.dtype.name) for v in variables]

    def on_host(*arrays: Array) -> list[Array]:
        check_parameters(process_set.group(), described)
        flats = pack(arrays)
        for dtype, flat in flats.items():
            label = None if name is None else f"{name}.{dtype.name}"
            broadcast_start(flat, root_rank, label, process_set).wait()
        return [part.copy() for part in unpack(flats, arrays)]

    return host.call(on_host, variables, [v.dtype for v in variables], [v.shape for v in variables])


def broadcast_object(
    obj: Any = None,
    root_rank: int = 0,
    session: Any = None,
    name: str | None = None,
    process_set: ProcessSet = global_process_set,
) -> Any:
    """Return the object of rank ``root_rank`` on every rank.

    Args:
        obj: anything that pickles; only that of ``root_rank`` counts.
        session: accepted for Horovod's sake; TensorFlow 2 has none.
    """
    return shared.broadcast_object(obj, root_rank, name, process_set)


def allgather_object(
    obj: Any,
    session: Any = None,
    name: str | None = None,
    process_set: ProcessSet = global_process_set,
) -> list[Any]:
    """Return the objects of all ranks, by rank; each is anything that pickles."""
    return shared.allgather_object(obj, name, process_set)


def broadcast_object_fn(
    root_rank: int = 0,
    session: Any = None,
    name: str | None = None,
    process_set: ProcessSet = global_process_set,
) -> Callable[[Any], Any]:
    """Return a function of an object that returns that of rank ``root_rank``.

    Args:
        session: accepted for Horovod's sake; TensorFlow 2 has none.
    """

    def send(obj: Any) -> Any:
        return shared.broadcast_object(obj, root_rank, name, process_set)

    return send


def broadcast_global_variables(root_rank: int) -> None:
    """Refuse: TensorFlow 2 keeps no list of all variables.

    Raises:
        UnsupportedError: always; it names the remedy.
    """
    raise UnsupportedError(_NO_GLOBALS.format(what="broadcast_global_variables()"))


class BroadcastGlobalVariablesHook:
    """Horovod's hook for sessions, which TensorFlow 2 does not have.

    Raises:
        UnsupportedError: always; it names the remedy.
    """

    def __init__(self, root_rank: int, device: str = ""):
        raise UnsupportedError(_NO_GLOBALS.format(what="BroadcastGlobalVariablesHook"))


_NO_GLOBALS = (
    "{what} needs TensorFlow 1's list of all variables, and TensorFlow 2 has none. Call "
    "broadcast_variables(model.variables, root_rank=0) and broadcast_variables("
    "optimizer.variables, root_rank=0) after the first batch, or with Keras add the callback "
    "BroadcastGlobalVariablesCallback(0)"
)
