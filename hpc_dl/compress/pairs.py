"""Which compressors go with which optimizers: pairs known not to converge are refused.

Error feedback sends late what it does not send now. An optimizer that is linear in the gradient
does not mind; one that divides by a running size of the gradient takes what comes late, and all
at once, for a larger gradient. Momentum before compression must not be taken again after it.
"""

from collections.abc import Callable, Iterable
from typing import Any, Literal, NamedTuple

from hpc_dl.compress.rules import Policy, policy_of
from hpc_dl.compress.scheme import Scheme
from hpc_dl.errors import OptionError

Family = Literal["sgd", "adaptive", "sign", "other"]

#: Parts of the names of optimizers that divide by a running size of the gradient, or of its
#: second moments (Shampoo, SOAP), or of the curvature (Sophia, AdaHessian).
_ADAPTIVE = (
    "adabelief",
    "adabound",
    "adadelta",
    "adafactor",
    "adagrad",
    "adahessian",
    "adam",
    "adan",
    "adasmooth",
    "ademamix",
    "adopt",
    "diffgrad",
    "ftrl",
    "lamb",
    "laprop",
    "madgrad",
    "novograd",
    "prodigy",
    "ranger",
    "rmsprop",
    "shampoo",
    "soap",
    "sophia",
    "yogi",
)
#: Names of others of them, which are parts of other words.
_ADAPTIVE_NAMES = ("came",)
#: Parts of the names of optimizers that take the sign of the gradient or of a momentum.
_SIGN = ("lion", "rprop", "signsgd", "signum", "tiger")

_ANYWAY = "hpc_dl.compress.unchecked(compression) lets it pass"


class Optimizer(NamedTuple):
    """What matters about an optimizer here."""

    name: str
    """Its class's."""
    family: Family
    momentum: float = 0.0
    """That it takes itself, of the largest of its groups; not the averages of an adaptive one."""
    shared_momentum: float = 0.0
    """The beta of the momentum that it expects instead of gradients after the warm-up."""


#: Where nothing is known about the optimizer: that of a gradient tape.
UNKNOWN = Optimizer("optimizer", "other")


def family_of(names: Iterable[str]) -> Family:
    """Tell an optimizer's family by the names of its class and of those it derives from."""
    lower = [name.lower() for name in names]
    if any(part in name for name in lower for part in _ADAPTIVE):
        return "adaptive"
    if any(name in _ADAPTIVE_NAMES for name in lower):
        return "adaptive"
    if any(part in name for name in lower for part in _SIGN):
        return "sign"
    return "sgd" if any("sgd" in name for name in lower) else "other"


def unchecked(compression: Any) -> Policy:
    """Let a compression go with any optimizer, also where it is known not to converge.

    Args:
        compression: what ``policy_of`` reads.

    >>> unchecked("topk:error_feedback=off").checked
    False
    """
    return policy_of(compression)._replace(checked=False)


def check(policy: Policy) -> None:
    """Refuse schemes that converge with no optimizer.

    Raises:
        OptionError: names the remedy.
    """
    if not policy.checked:
        return
    candidates = () if policy.auto is None else policy.auto.candidates
    for rule in (*policy.rules, *(rule for c in candidates for rule in policy_of(c).rules)):
        _raise(flaw(rule.scheme))


def fit(optimizer: Optimizer, policy: Policy) -> tuple[Policy, list[str]]:
    """Check that an optimizer and a policy go together.

    Returns:
        The policy, of an automatic choice without the candidates that do not fit; and warnings.

    Raises:
        OptionError: a pair that is known not to converge; names the remedy.
    """
    if not policy.checked:
        return policy, []
    if policy.auto is not None:
        return _fit_candidates(optimizer, policy)
    for rule in policy.rules:
        _raise(flaw(rule.scheme) or conflict(optimizer, rule.scheme))
    advices = [advice(optimizer, rule.scheme) for rule in policy.rules]
    return policy, list(dict.fromkeys(text for text in advices if text is not None))


def _fit_candidates(optimizer: Optimizer, policy: Policy) -> tuple[Policy, list[str]]:
    assert policy.auto is not None
    fitting, advices, reason = [], [], ""
    for candidate in policy.auto.candidates:
        schemes = [rule.scheme for rule in policy_of(candidate).rules]
        reasons = [text for s in schemes if (text := flaw(s) or conflict(optimizer, s))]
        if reasons:
            reason = reasons[0]
        else:
            fitting.append(candidate)
            advices += [text for s in schemes if (text := advice(optimizer, s))]
    if not fitting:
        raise OptionError(f"none of the candidates of compression='auto' fits: {reason}")
    auto = policy.auto._replace(candidates=tuple(fitting))
    return policy._replace(auto=auto), list(dict.fromkeys(advices))


def _raise(reason: str | None) -> None:
    if reason is not None:
        raise OptionError(f"{reason}. {_ANYWAY}")


def flaw(scheme: Scheme) -> str | None:
    """Say why a scheme converges with no optimizer, and what to do."""
    inner = scheme.compressor
    if inner.needs_feedback and scheme.residual == "off":
        return (
            f"compression={scheme.name!r} with error_feedback=off loses for good what it does "
            "not send, and does not converge (Karimireddy et al., ICML 2019); leave "
            "error_feedback at its default"
        )
    if not inner.keeps_scale and scheme.residual != "off":
        return (
            f"compression={scheme.name!r} with error_feedback={scheme.residual}: what it sends "
            "is not as large as the gradient, so what is left grows without bound; use 'onebit', "
            "whose signs have a scale, or error_feedback=off"
        )
    return None


def conflict(optimizer: Optimizer, scheme: Scheme) -> str | None:
    """Say why a scheme does not go with an optimizer, and what to do."""
    tests: tuple[Callable[[Optimizer, Scheme], str | None], ...] = (_momenta, _shared, _signs)
    return next((text for test in tests if (text := test(optimizer, scheme))), None)


def _momenta(optimizer: Optimizer, scheme: Scheme) -> str | None:
    """Momentum before compression goes with no other."""
    if not scheme.momentum and not scheme.compressor.owns_momentum:
        return None
    whose = f"compression={scheme.name!r} takes momentum before it compresses"
    if optimizer.family in ("adaptive", "sign"):
        return (
            f"{whose}, which {optimizer.name} would take for a gradient; use SGD with momentum=0, "
            "or a compression without momentum"
        )
    if optimizer.momentum:
        return (
            f"{whose}, and {optimizer.name} has momentum={optimizer.momentum:g}: it would be "
            f"taken twice; give {optimizer.name} momentum=0 and keep that of the compression"
        )
    return None


def _shared(optimizer: Optimizer, scheme: Scheme) -> str | None:
    """What is averaged must be what the optimizer takes it for."""
    if scheme.shared_momentum != optimizer.shared_momentum:
        return (
            f"compression={scheme.name!r} averages momentum with beta={scheme.shared_momentum:g}, "
            f"and {optimizer.name} expects beta={optimizer.shared_momentum:g} (0: gradients); "
            "use OneBitAdam or OneBitLamb with the compression that they bring along"
        )
    if optimizer.shared_momentum and not scheme.compressor.keeps_scale:
        return (
            f"compression={scheme.name!r} sends signs without a scale, and {optimizer.name} "
            "divides momentum by the size of the gradient; use 'onebit'"
        )
    return None


def _signs(optimizer: Optimizer, scheme: Scheme) -> str | None:
    """The variance of signs says nothing about that of the gradient."""
    corrected = scheme.residual != "off" and not optimizer.shared_momentum
    if optimizer.family == "adaptive" and scheme.name == "onebit" and corrected:
        return (
            f"compression={scheme.name!r} with {optimizer.name} does not converge: the variance "
            "of what is sent is not that of the gradient (Tang et al., ICML 2021); use OneBitAdam "
            "or OneBitLamb of this package, which compress the momentum, or SGD"
        )
    return None


def advice(optimizer: Optimizer, scheme: Scheme) -> str | None:
    """Say what to look out for in a pair that may well converge."""
    if optimizer.family not in ("adaptive", "sign") or optimizer.shared_momentum:
        return None
    if scheme.residual != "off":
        remedy = ", or use OneBitAdam" if optimizer.family == "adaptive" else ""
        return (
            f"compression={scheme.name!r} keeps what it does not send for later, which suits "
            f"optimizers that are linear in the gradient; {optimizer.name} is not. Compare the "
            f"accuracy with a run without compression{remedy}"
        )
    if not scheme.compressor.keeps_scale:
        return (
            f"{optimizer.name} with compression={scheme.name!r} is signSGD with momentum "
            "(Bernstein et al., ICML 2018): all values that arrive have one magnitude, so there "
            "is nothing for it to adapt to. Choose the learning rate for that, or use SGD"
        )
    return None
