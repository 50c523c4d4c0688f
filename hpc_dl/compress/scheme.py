"""A compressor with what surrounds it: error feedback, momentum correction, warm-up.

Decorators return a new scheme, so they read from the inside out:

    warmup(error_feedback(TopK(ratio=0.01), residual="bf16"), steps=100)
"""

from dataclasses import fields
from typing import NamedTuple, Union

from hpc_dl.compress.base import Compressor, Sparsifier
from hpc_dl.errors import OptionError

#: In which types a residual may be kept; "off" keeps none.
RESIDUALS = ("fp32", "bf16", "int8", "off")


class Scheme(NamedTuple):
    """How a gradient is compressed."""

    compressor: Compressor
    residual: str = "off"
    """In which type what was not sent is kept: one of ``RESIDUALS``."""
    momentum: float = 0.0
    """Momentum that is taken before compression instead of after it."""
    warmup: int = 0
    """Steps at the beginning in which gradients are sent as they are."""
    shared_momentum: float = 0.0
    """After the warm-up, what is averaged is not the gradient but the momentum of all ranks,
    ``beta * momentum + (1 - beta) * gradient`` with this beta. For optimizers that expect it
    (Tang et al., "1-bit Adam", ICML 2021)."""

    @property
    def name(self) -> str:
        """The compressor's name."""
        return self.compressor.name

    def describe(self) -> str:
        """Write it as a spec string with all options."""
        options = {
            **{f.name: getattr(self.compressor, f.name) for f in fields(self.compressor)},  # type: ignore[arg-type]
            "error_feedback": self.residual,
            "momentum": self.momentum,
            "warmup": self.warmup,
        }
        if self.shared_momentum:  # set by optimizers that expect it, not by a spec string
            options["shared_momentum"] = self.shared_momentum
        return f"{self.name}:" + ",".join(f"{key}={value}" for key, value in options.items())


Compressible = Union[Compressor, "Scheme"]


def scheme_of(inner: Compressible) -> Scheme:
    """Return a scheme; a compressor that needs error feedback gets it."""
    if isinstance(inner, Scheme):
        return inner
    return Scheme(inner, "fp32" if inner.needs_feedback else "off", inner.default_momentum)


def error_feedback(inner: Compressible, residual: str = "fp32") -> Scheme:
    """Keep what was not sent and add it to the next gradient.

    Seide et al., "1-bit stochastic gradient descent", Interspeech 2014; Karimireddy et al.,
    "Error feedback fixes SignSGD", ICML 2019.

    Args:
        residual: ``fp32``, ``bf16`` (half the memory), ``int8`` (a quarter; what rounding
            leaves out is lost), or ``off``.

    Raises:
        OptionError: another type.
    """
    if residual not in RESIDUALS:
        raise OptionError.unknown("residual", residual, RESIDUALS)
    return scheme_of(inner)._replace(residual=residual)


def momentum_correction(inner: Compressible, momentum: float = 0.9) -> Scheme:
    """Take momentum on each rank before compression; the optimizer must have none.

    Entries that were sent start again without momentum. Lin et al., "Deep Gradient
    Compression", ICLR 2018, sections 3.1 and 3.2.

    Raises:
        OptionError: not between 0 and 1, or a compressor that has momentum of its own.
    """
    scheme = scheme_of(inner)
    if not 0 <= momentum < 1:
        raise OptionError(f"momentum={momentum}; give a number from 0 to below 1")
    own = {field.name for field in fields(scheme.compressor)}  # type: ignore[arg-type]
    has_own = scheme.compressor.owns_momentum or "momentum" in own
    if has_own and momentum != scheme.compressor.default_momentum:
        raise OptionError(
            f"{scheme.name} has momentum of its own; set its option instead of momentum_correction"
        )
    if momentum and not isinstance(scheme.compressor, Sparsifier):
        raise OptionError(
            f"momentum correction goes with compressors that select entries, not with "
            f"{scheme.name}; leave the momentum to the optimizer"
        )
    return scheme._replace(momentum=momentum)


def warmup(inner: Compressible, steps: int) -> Scheme:
    """Send gradients as they are for so many steps.

    Raises:
        OptionError: a negative number.
    """
    if steps < 0:
        raise OptionError(f"warmup={steps}; give a number of steps, 0 or more")
    return scheme_of(inner)._replace(warmup=steps)
