"""The options that optimizers and tapes of all frameworks share, and the gradients they are for."""

import itertools
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from hpc_dl.comm import Op
from hpc_dl.compress import Policy, pairs, policy_of
from hpc_dl.errors import OptionError
from hpc_dl.reduce.build import DENSE, check_op
from hpc_dl.world.local import native
from hpc_dl.world.process_sets import ProcessSet

Names = tuple[str, ...]


class Gradient(NamedTuple):
    """A gradient, the name under which ranks compare it, and what it belongs to."""

    name: str
    value: Any
    """A tensor of the framework, dense or sparse, or None where there is none."""
    source: Any
    """A variable, or a tensor."""


def unique(names: Sequence[str]) -> list[str]:
    """Number names that occur more than once."""
    seen: dict[str, int] = {}
    result = []
    for name in names:
        number = seen[name] = seen.get(name, 0) + 1
        result.append(name if number == 1 else f"{name}#{number}")
    return result


def gradient_compression(given: Any, casts: Mapping[Any, str]) -> Any:
    """Read what the user gives as ``compression`` of gradients.

    Args:
        given: what ``policy_of`` reads; or a class with ``compress`` and ``decompress``.
        casts: classes that stand for compressors by name.

    Returns:
        A ``Policy``, or the class.

    Raises:
        OptionError: something else, or a bad name or option.
    """
    if isinstance(given, type) and given in casts:
        return policy_of(casts[given])
    if hasattr(given, "compress") and hasattr(given, "decompress"):
        return given
    return policy_of(given)


def on_host(compression: Any) -> Policy:
    """Return what compressors do on the host beyond a cast that the framework can do."""
    if isinstance(compression, Policy) and compression.cast is None:
        return compression
    return DENSE


class GradientOptions(NamedTuple):
    """How an optimizer or a tape combines gradients; see ``gradient_options``."""

    op: Op
    compression: Any
    predivide: float
    sparse_as_dense: bool
    groups: int | tuple[tuple[Any, ...], ...]
    """A number of groups, or the variables of each group."""
    process_set: ProcessSet
    guard: bool

    @property
    def takes_momentum(self) -> bool:
        """Whether momentum is taken before compression; not left to the optimizer on one rank."""
        return isinstance(self.compression, Policy) and self.compression.takes_momentum

    @property
    def combines(self) -> bool:
        """Whether this rank has gradients to combine; alone, momentum may be left to take."""
        several = self.process_set.size() > 1
        return self.process_set.included() and (several or self.takes_momentum)


def gradient_options(
    op: Op | str,
    compression: Any,
    predivide: float,
    sparse_as_dense: bool,
    groups: Any,
    process_set: ProcessSet,
    guard: bool,
) -> GradientOptions:
    """Check the options of Horovod's ``DistributedOptimizer`` and ``DistributedGradientTape``.

    Raises:
        OptionError: one that is not allowed, or two that do not go together.
    """
    try:
        op = Op(op)
    except ValueError:
        raise OptionError.unknown("op", op, [o.value for o in Op]) from None
    if isinstance(compression, Policy) and op is not Op.ADASUM:
        pairs.check(compression)
        if compression.lossy:
            check_op(op)
    if predivide <= 0:
        raise OptionError(f"gradient_predivide_factor={predivide}; give a number > 0")
    if predivide != 1.0 and op is not Op.AVERAGE:
        raise OptionError(
            f"gradient_predivide_factor={predivide} goes with op=Average only; got op={op.value}"
        )
    return GradientOptions(
        op, compression, predivide, sparse_as_dense, _groups(groups), process_set, guard
    )


def _groups(groups: Any) -> int | tuple[tuple[Any, ...], ...]:
    if groups is None:
        return 0
    if isinstance(groups, int) and groups >= 0:
        return groups
    if (
        isinstance(groups, list | tuple)
        and all(isinstance(g, list | tuple) for g in groups)
        and not any(isinstance(member, str) for g in groups for member in g)
    ):
        return tuple(tuple(group) for group in groups)
    raise OptionError(
        f"groups={groups!r}: give a number of groups, 0 or more, or a list of lists of variables "
        "(not of their names)"
    )


def group_names(
    groups: int | tuple[tuple[Any, ...], ...], names: Sequence[str], variables: Sequence[Any]
) -> tuple[Names, ...]:
    """Say by name which gradients travel together.

    Args:
        groups: a number of groups, or the variables of each.
        names: of ``variables``, whose gradients are reduced.

    Raises:
        OptionError: a variable that is in two groups.
    """
    if isinstance(groups, int):
        if groups == 0:
            return ()
        count = min(groups, len(names))
        bounds = [len(names) * i // max(count, 1) for i in range(count + 1)]
        return tuple(tuple(names[a:b]) for a, b in itertools.pairwise(bounds))
    name_of = {id(native(v)): name for name, v in zip(names, variables, strict=True)}
    resolved = tuple(
        tuple(name_of[id(native(v))] for v in group if id(native(v)) in name_of) for group in groups
    )
    flat = [name for group in resolved for name in group]
    twice = next((name for name in flat if flat.count(name) > 1), None)
    if twice is not None:
        raise OptionError(f"groups: {twice!r} is in two groups; a variable goes in one")
    return resolved
