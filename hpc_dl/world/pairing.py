"""Check an optimizer and its compression before training begins, on any number of ranks."""

import functools
import logging
from typing import Any

from hpc_dl.comm import Op
from hpc_dl.compress import Policy, pairs
from hpc_dl.errors import OptionError
from hpc_dl.world.state import current

log = logging.getLogger("hpc_dl.compress")


def fitting(optimizer: pairs.Optimizer, compression: Any) -> Any:
    """Return the compression for an optimizer; warn of what may go wrong.

    Args:
        compression: a ``Policy``, or a class of the user's own, of which nothing is known.

    Raises:
        OptionError: a pair that is known not to converge.
    """
    if not isinstance(compression, Policy):
        return compression
    policy, warnings = pairs.fit(optimizer, compression)
    if current().comm.rank == 0:
        for text in warnings:
            _warn(text)
    return policy


@functools.cache
def _warn(text: str) -> None:
    """Warn once in a process."""
    log.warning("%s", text)


def check_shared(name: str, given: Any, op: Op, predivide: float) -> None:
    """Check the options of a distributed optimizer that shares its momentum.

    Args:
        name: of the optimizer.
        given: the compression that ``DistributedOptimizer`` was given.

    Raises:
        OptionError: one that does not go with it.
    """
    if not isinstance(given, Policy) or given.rules or given.auto is not None:
        raise OptionError(
            f"{name} brings its compression along; write {name}(..., compression='onebit') and "
            "no compression in DistributedOptimizer"
        )
    if op is not Op.AVERAGE or predivide != 1:
        raise OptionError(
            f"op={op.value}, gradient_predivide_factor={predivide}: {name} needs averages, so "
            "leave both at their defaults"
        )
