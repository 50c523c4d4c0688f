"""How gradients travel for optimizers that share their momentum: 1-bit Adam and 1-bit LAMB."""

from typing import Any

from hpc_dl.compress.rules import Auto, Policy, only
from hpc_dl.errors import OptionError


def shared_momentum(compression: Any, beta: float, freeze_step: int) -> Policy:
    """Average gradients as they are until ``freeze_step``, then compressed momentum.

    Tang et al., "1-bit Adam", ICML 2021. All parameters travel alike, however small, as the
    optimizer must know what it is given.

    Args:
        compression: a spec string, a mapping, a compressor or a scheme.
        beta: of the momentum.
        freeze_step: steps of the warm-up.

    Raises:
        OptionError: bad values, or a compression that cannot be combined with them.
    """
    if not 0 < beta < 1:
        raise OptionError(f"beta={beta} of the momentum; give a number between 0 and 1")
    if freeze_step < 1:
        raise OptionError(f"freeze_step={freeze_step}; give a number of steps, 1 or more")
    if compression == "auto" or isinstance(compression, Auto):
        raise OptionError(
            "compression='auto' chooses for gradients, and here it is momentum that is sent; give "
            "a compressor such as 'onebit'"
        )
    rule = only("*", compression, min_bytes=0, min_ndim=0)
    if rule.scheme.warmup not in (0, freeze_step):
        raise OptionError(
            f"warmup={rule.scheme.warmup} and freeze_step={freeze_step}: both are the steps in "
            "which gradients travel as they are; give freeze_step only"
        )
    scheme = rule.scheme._replace(warmup=freeze_step, shared_momentum=beta)
    return Policy((rule._replace(scheme=scheme),))
