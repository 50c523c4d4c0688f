"""Collectives on values and variables of any Keras backend, with Horovod's names."""

from collections.abc import Iterable
from typing import Any

import keras

from hpc_dl.comm import Op
from hpc_dl.errors import UnsupportedError
from hpc_dl.keras import backend
from hpc_dl.world import ProcessSet, global_process_set
from hpc_dl.world.collectives import broadcast_start, pack, unpack
from hpc_dl.world.parameters import Described, check_parameters


def allreduce(
    value: Any,
    name: str | None = None,
    average: bool | None = None,
    prescale_factor: float = 1.0,
    postscale_factor: float = 1.0,
    op: Op | None = None,
    compression: Any = backend.adapter.Compression.none,
) -> Any:
    """Combine a value over the ranks into a tensor of the backend.

    Args:
        value: a number, an array, a tensor or a variable; the same shape on all ranks.
        op: Average (the default), Sum, Min, Max or Product.
    """
    return backend.adapter.allreduce(
        keras.ops.convert_to_tensor(value),
        average=average,
        compression=compression,
        op=op,
        prescale_factor=prescale_factor,
        postscale_factor=postscale_factor,
        name=name,
    )


def allgather(value: Any, name: str | None = None) -> Any:
    """Concatenate the ranks' values along dimension 0, which may differ."""
    return backend.adapter.allgather(keras.ops.convert_to_tensor(value), name=name)


def broadcast(value: Any, root_rank: int, name: str | None = None) -> Any:
    """Return the value of rank ``root_rank`` as a tensor of the backend."""
    return backend.adapter.broadcast(keras.ops.convert_to_tensor(value), root_rank, name=name)


def reducescatter(value: Any, name: str | None = None, op: Op = Op.AVERAGE) -> Any:
    """Combine a value over the ranks, each keeping its part of dimension 0."""
    return backend.adapter.reducescatter(keras.ops.convert_to_tensor(value), name=name, op=op)


def broadcast_variables(
    variables: Iterable[Any], root_rank: int, process_set: ProcessSet = global_process_set
) -> None:
    """Overwrite Keras variables, in place, with those of rank ``root_rank``.

    Raises:
        MismatchError: on all ranks, if names, shapes or types differ between them.
    """
    targets = list(variables)
    arrays = [backend.to_numpy(v) for v in targets]
    check_parameters(
        process_set.group(),
        [
            Described(getattr(v, "path", v.name), array.shape, array.dtype.name)
            for v, array in zip(targets, arrays, strict=True)
        ],
    )
    flats = pack(arrays)
    for flat in flats.values():
        broadcast_start(flat, root_rank, None, process_set).wait()
    for variable, value in zip(targets, unpack(flats, arrays), strict=True):
        variable.assign(value)


def broadcast_global_variables(root_rank: int, model: Any = None) -> None:
    """Broadcast all variables of a model and of its optimizer from one rank.

    Args:
        model: a built Keras model. Horovod had none here: it took all variables there are,
            of which Keras 3 keeps no list.

    Raises:
        UnsupportedError: without a model; it names the remedy.
    """
    if model is None:
        raise UnsupportedError(
            "Keras 3 keeps no list of all variables; pass the model: "
            f"broadcast_global_variables({root_rank}, model), or give model.fit() the callback "
            f"BroadcastGlobalVariablesCallback({root_rank})"
        )
    broadcast_variables(global_variables(model), root_rank)


def global_variables(model: Any) -> list[Any]:
    """Return the variables of a model and its optimizer that are to be equal on all ranks.

    The states of random generators are not among them: they are a rank's own.
    """
    optimizer = getattr(model, "optimizer", None)
    owned = [] if optimizer is None else optimizer.variables
    return [*model.weights, *owned]
