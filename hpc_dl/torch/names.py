"""The names of an optimizer's parameters, by which ranks compare them."""

from collections.abc import Iterable

import torch

from hpc_dl.errors import OptionError

Named = list[tuple[str, torch.nn.Parameter]]


def check_names(
    optimizer: torch.optim.Optimizer, named: Iterable[tuple[str, torch.nn.Parameter]] | None
) -> Named:
    """Return the optimizer's parameters with their names.

    Args:
        named: ``model.named_parameters()``; None: names are made up.

    Raises:
        OptionError: no tuples, duplicate names, or parameters without one.
    """
    own = [
        (f"allreduce.noname.{i}.{j}", p)
        for i, group in enumerate(optimizer.param_groups)
        for j, p in enumerate(group["params"])
    ]
    if named is not None:
        entries = list(named)
        if any(not isinstance(entry, tuple) for entry in entries):
            raise OptionError(
                "named_parameters must be tuples (name, parameter), as model.named_parameters() "
                f"makes them; got {type(entries[0]).__name__}"
            )
        names = [name for name, _ in entries]
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise OptionError(
                f"named_parameters has duplicate names: {', '.join(twice)}. Names must be unique; "
                "with several models prefix them, for example f'encoder.{name}'"
            )
        name_of = {p: name for name, p in entries}
        unnamed = [label for label, p in own if p not in name_of]
        if unnamed:
            raise OptionError(
                f"named_parameters leaves out {len(unnamed)} of the optimizer's {len(own)} "
                f"parameters (first: {unnamed[0]}); name all, or none"
            )
        own = [(name_of[p], p) for _, p in own]
    return own
