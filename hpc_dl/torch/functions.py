"""Give all ranks the same parameters and the same optimizer state before training."""

from collections.abc import Iterable, Mapping
from typing import Any

import torch

from hpc_dl.errors import OptionError
from hpc_dl.torch.collectives import broadcast_async_
from hpc_dl.world import ProcessSet, broadcast_object, current, global_process_set
from hpc_dl.world.parameters import Described, check_parameters


def broadcast_parameters(
    params: Mapping[str, Any] | Iterable[Any],
    root_rank: int = 0,
    process_set: ProcessSet = global_process_set,
) -> None:
    """Overwrite parameters, in place, with those of rank ``root_rank``.

    Args:
        params: ``model.state_dict()``, ``model.named_parameters()`` or ``model.parameters()``.
            Entries that are no tensors (extra state) are left alone.

    Raises:
        MismatchError: on all ranks, if names, shapes or types differ between them.
    """
    tensors = [(name, p) for name, p in _named(params) if isinstance(p, torch.Tensor)]
    described = [Described(name, tuple(p.shape), str(p.dtype)) for name, p in tensors]
    check_parameters(process_set.group(), described)
    handles = [
        broadcast_async_(p, root_rank, f"broadcast_parameters.{name}", process_set)
        for name, p in tensors
    ]
    for handle in handles:
        handle.wait()


def _named(params: Mapping[str, Any] | Iterable[Any]) -> list[tuple[str, Any]]:
    if isinstance(params, Mapping):
        return sorted(params.items())
    if isinstance(params, torch.Tensor | str):
        raise OptionError(
            f"broadcast_parameters got a {type(params).__name__}; give model.state_dict(), "
            "model.named_parameters() or model.parameters()"
        )
    entries = list(params)
    return [
        (str(entry[0]), entry[1]) if isinstance(entry, tuple) else (f"parameter.{i}", entry)
        for i, entry in enumerate(entries)
    ]


class _Place:
    """Stands for a tensor in a state that is sent as an object; tensors travel by themselves."""

    def __init__(self, index: int, tensor: torch.Tensor):
        self.index, self.shape, self.dtype = index, tuple(tensor.shape), tensor.dtype


def broadcast_optimizer_state(
    optimizer: torch.optim.Optimizer,
    root_rank: int = 0,
    model: Any = None,
    process_set: ProcessSet = global_process_set,
) -> None:
    """Give every rank the optimizer state and options of rank ``root_rank``.

    Only ``root_rank`` needs to have a state: the others may be new, for example when one
    rank has loaded a checkpoint.

    Args:
        model: accepted for Horovod's sake.
    """
    is_root = current().comm.rank == root_rank
    tensors: list[torch.Tensor] = []
    skeleton = _take_tensors(optimizer.state_dict(), tensors) if is_root else None
    skeleton = broadcast_object(skeleton, root_rank, "optimizer_state", process_set)
    if not is_root:
        tensors = [torch.empty(p.shape, dtype=p.dtype) for p in _places(skeleton)]
    handles = [
        broadcast_async_(tensor.cpu(), root_rank, f"optimizer_state.{i}", process_set)
        for i, tensor in enumerate(tensors)
    ]
    received = [handle.wait() for handle in handles]
    # The root, too, forgets what compression owes: all ranks owe of the same steps.
    optimizer.load_state_dict(_put_tensors(skeleton, received))


def _take_tensors(state: Any, tensors: list[torch.Tensor]) -> Any:
    """Move the tensors of a nested state into ``tensors`` and return the rest."""
    if isinstance(state, torch.Tensor):
        tensors.append(state)
        return _Place(len(tensors) - 1, state)
    if isinstance(state, dict):
        return {key: _take_tensors(value, tensors) for key, value in state.items()}
    if isinstance(state, list | tuple):
        return type(state)(_take_tensors(value, tensors) for value in state)
    return state


def _places(state: Any) -> list[_Place]:
    """Return the places of tensors in a state, in their order."""
    if isinstance(state, _Place):
        return [state]
    if isinstance(state, dict):
        state = list(state.values())
    if isinstance(state, list | tuple):
        return [place for value in state for place in _places(value)]
    return []


def _put_tensors(state: Any, tensors: list[torch.Tensor]) -> Any:
    """Undo ``_take_tensors``."""
    if isinstance(state, _Place):
        return tensors[state.index]
    if isinstance(state, dict):
        return {key: _put_tensors(value, tensors) for key, value in state.items()}
    if isinstance(state, list | tuple):
        return type(state)(_put_tensors(value, tensors) for value in state)
    return state
