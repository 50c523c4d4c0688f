"""Which parameter is compressed how: rules on name, shape and size.

Small and one-dimensional parameters (biases, norms) are a thousandth of the bytes and most of
what compression harms, so they stay dense unless a rule says otherwise.
"""

import fnmatch
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, NamedTuple

import numpy as np

from hpc_dl.compress import registry
from hpc_dl.compress.base import Compressor
from hpc_dl.compress.casts import Cast, NoCompression
from hpc_dl.compress.scheme import Scheme, scheme_of
from hpc_dl.errors import OptionError

#: Parameters of fewer bytes stay dense, by default.
MIN_BYTES = 64 << 10
#: So do those of fewer dimensions.
MIN_NDIM = 2

_DENSE = Scheme(NoCompression())

#: Option of ``Limits`` -> whether a number is allowed, and which are, in words.
_ALLOWED: dict[str, tuple[Callable[[float], bool], str]] = {
    "min_cosine": (lambda x: -1 <= x <= 1, "from -1 to 1"),
    "max_residual": (lambda x: x > 0, "above 0"),
    "max_loss": (lambda x: x > 1, "above 1"),
}


@dataclass(frozen=True)
class Limits:
    """What compression must not do to a gradient; beyond it all ranks send bfloat16 instead.

    Raises:
        OptionError: a value that is not allowed.
    """

    every: int = 100
    """Steps between two looks; 0 looks never."""
    min_cosine: float = 0.0
    """Between a gradient, with what was left of the steps before, and what is sent of it."""
    max_residual: float = 1000.0
    """Norm of what is left, in norms of the gradient."""
    max_loss: float = 3.0
    """Loss, in running averages of the loss; where losses are reported."""
    pause: int = 500
    """Steps without compression before it is tried again."""
    tries: int = 3
    """Suspensions after which it is not tried again."""

    def __post_init__(self) -> None:
        for name, least in (("every", 0), ("pause", 1), ("tries", 1)):
            value = getattr(self, name)
            if type(value) is not int or value < least:
                raise OptionError(f"limits: {name}={value!r}; give a whole number from {least} on")
        for name, (allowed, said) in _ALLOWED.items():
            value = getattr(self, name)
            if type(value) not in (int, float) or not allowed(value):
                raise OptionError(f"limits: {name}={value!r}; give a number {said}")


class Auto(NamedTuple):
    """Compress as pays: measured in the first steps, in which nothing is compressed."""

    candidates: tuple[Any, ...] = ("none", "fp16", "int8", "powersgd:rank=4", "topk", "onebit")
    """Schemes to choose from, those that change gradients least first."""
    steps: int = 10
    """Steps after which to choose."""
    gain: float = 0.03
    """By what part of a step a scheme must be faster than those before it."""


class Rule(NamedTuple):
    """Which parameters a scheme is for."""

    scheme: Scheme
    pattern: str = "*"
    """A shell pattern on the name."""
    min_bytes: int = MIN_BYTES
    min_ndim: int = MIN_NDIM

    def matches(self, name: str, shape: Sequence[int], dtype: Any) -> bool:
        """Tell whether a parameter is one of them."""
        nbytes = int(np.prod(shape, dtype=np.int64)) * np.dtype(dtype).itemsize
        return (
            fnmatch.fnmatchcase(name, self.pattern)
            and nbytes >= self.min_bytes
            and len(shape) >= self.min_ndim
        )


class Travel(NamedTuple):
    """How a gradient travels."""

    dtype: np.dtype[np.generic]
    """Of its bucket."""
    scheme: Scheme | None
    """None for an all-reduce of the bucket as it is."""


def _travel(scheme: Scheme, dtype: np.dtype[np.generic]) -> Travel:
    momentum = scheme.momentum or scheme.shared_momentum
    plain = scheme.residual == "off" and not scheme.warmup and not momentum
    if scheme.name == "none" and not momentum:
        return Travel(dtype, None)
    if plain and isinstance(scheme.compressor, Cast):
        return Travel(scheme.compressor.wire_dtype, None)
    return Travel(np.dtype(np.float32), scheme)


class Policy(NamedTuple):
    """Rules in order: the first that matches counts; none means dense."""

    rules: tuple[Rule, ...]
    limits: Limits = Limits()
    """When compression is suspended."""
    seed: int = 0
    auto: Auto | None = None
    """Choose the rules after the first steps."""
    checked: bool = True
    """Refuse what is known not to converge; see ``hpc_dl.compress.pairs``."""

    @property
    def lossy(self) -> bool:
        """Whether any rule does more than cast."""
        return any(_travel(r.scheme, np.dtype(np.float32)).scheme is not None for r in self.rules)

    @property
    def takes_momentum(self) -> bool:
        """Whether any rule takes momentum, which the optimizer must not take again."""
        return any(r.scheme.momentum or r.scheme.compressor.owns_momentum for r in self.rules)

    @property
    def cast(self) -> str | None:
        """The name of the cast that all gradients travel as; None where there is more to it."""
        if not self.rules:
            return "none" if self.auto is None else None
        rule = self.rules[0]
        everything = rule.pattern == "*" and not rule.min_bytes and not rule.min_ndim
        return rule.scheme.name if everything and not self.lossy else None

    def describe_type(self, dtype: Any) -> str:
        """Say in which type a gradient comes and how it travels: what ranks compare."""
        name = str(getattr(dtype, "name", dtype))
        said = self.describe()
        return f"{name}, {said}" if said else name

    def describe(self) -> str:
        """Say what is compressed how, the same for equal policies."""
        rules = (
            f"{r.pattern}>={r.min_bytes}B,{r.min_ndim}d: {r.scheme.describe()}" for r in self.rules
        )
        said = ["; ".join(rules) if self.auto is None else f"auto: {self.auto}"]
        if self.limits != Limits():
            said.append(str(self.limits))
        if self.seed:
            said.append(f"seed={self.seed}")
        return "; ".join(said)

    def travel(self, name: str, shape: Sequence[int], dtype: Any) -> Travel:
        """Say how a parameter's gradient travels.

        Only real floating-point gradients are compressed, whatever the rules say. Where
        momentum is taken before compression the optimizer has none, so the gradients that are
        not compressed get it here, too (Lin et al., 2018, do the same).
        """
        dtype = np.dtype(dtype)
        if not _is_real(dtype):
            return Travel(dtype, None)
        matching = (r.scheme for r in self.rules if r.matches(name, shape, dtype))
        scheme = next(matching, _DENSE)
        if not (scheme.momentum or scheme.compressor.owns_momentum):
            momentum = next((r.scheme.momentum for r in self.rules if r.scheme.momentum), 0.0)
            scheme = scheme._replace(momentum=momentum)
        return _travel(scheme, dtype)


def _is_real(dtype: Any) -> bool:
    return bool(np.dtype(dtype).kind == "f" or np.dtype(dtype).name == "bfloat16")


def only(
    pattern: str, compression: Any, min_bytes: int = MIN_BYTES, min_ndim: int = MIN_NDIM
) -> Rule:
    """Compress only parameters whose name matches a shell pattern.

    Args:
        compression: a spec string, a mapping, a compressor or a scheme.
        min_bytes: smaller parameters stay dense.
        min_ndim: so do those of fewer dimensions.
    """
    if min_bytes < 0 or min_ndim < 0:
        raise OptionError(f"min_bytes={min_bytes}, min_ndim={min_ndim}; give 0 or more")
    return Rule(_scheme(compression), pattern, min_bytes, min_ndim)


def policy_of(
    compression: Any,
    *,
    limits: Limits | Mapping[str, Any] | None = None,
    seed: int | None = None,
) -> Policy:
    """Read what the user gives as ``compression``.

    Args:
        compression: a spec string, a mapping with a ``name``, a compressor, a scheme, a
            rule, or a list of rules and of pairs (pattern, compression); ``"auto"``, or an
            ``Auto``. A mapping may have ``limits`` and ``seed``, too.
        limits: when compression is suspended: ``Limits``, or a mapping of some of them.
        seed: of random numbers, below 2**32; the same on all ranks.

    Raises:
        OptionError: something else, or a bad name or option.

    >>> policy = policy_of([("*.bias", "none"), ("*", "topk:ratio=0.01")])
    >>> policy.travel("fc.weight", (1000, 1000), "float32").scheme.name
    'topk'
    >>> policy_of({"name": "onebit", "limits": {"every": 10}, "seed": 7}).limits.every
    10
    """
    if isinstance(compression, Mapping):
        # Those of the policy, unless the compressor has an option of that name.
        name = compression.get("name")
        own = registry.options_of(registry.find(name)) if isinstance(name, str) else {}
        ours = [key for key in ("limits", "seed") if key in compression and key not in own]
        given = {key: compression[key] for key in ours}
        compression = {key: compression[key] for key in compression if key not in given}
        limits, seed = given.get("limits", limits), given.get("seed", seed)
    policy = _policy(compression)
    if limits is not None:
        policy = policy._replace(limits=_limits(limits))
    if seed is not None:
        if type(seed) is not int or not 0 <= seed < 1 << 32:
            raise OptionError(f"seed={seed!r}; give a whole number from 0 to {(1 << 32) - 1}")
        policy = policy._replace(seed=seed)
    return policy


def _limits(given: Limits | Mapping[str, Any]) -> Limits:
    if isinstance(given, Limits):
        return given
    if not isinstance(given, Mapping):
        raise OptionError(f"limits={given!r}; give a mapping such as {{'every': 10}}, or Limits")
    known = [field.name for field in fields(Limits)]
    for key in given:
        if key not in known:
            raise OptionError(
                f"unknown option {key!r} for limits; valid: {', '.join(sorted(known))}"
            )
    return Limits(**given)


def _policy(compression: Any) -> Policy:
    if isinstance(compression, Policy):
        return compression
    if compression == "auto":
        compression = Auto()
    if isinstance(compression, Auto):
        return Policy((), auto=_checked(compression))
    if isinstance(compression, Rule):
        return Policy((compression,))
    if isinstance(compression, list | tuple) and not isinstance(compression, Scheme):
        rules = tuple(_rule(item) for item in compression)
    else:
        rules = (_default_rule(compression),)
    nothing = all(rule.scheme.name == "none" for rule in rules)
    return Policy(() if nothing else rules)


def _checked(auto: Auto) -> Auto:
    """Fail here and now, and not after the first steps; make the candidates hashable."""
    if not auto.candidates:
        raise OptionError("Auto: candidates are empty; give what to choose from")
    if auto.steps < 1:
        raise OptionError(f"Auto: steps={auto.steps}; give 1 or more")
    if not 0 <= auto.gain < 1:
        raise OptionError(f"Auto: gain={auto.gain}; give a part of a step, from 0 to below 1")
    schemes = [(candidate, _scheme(candidate)) for candidate in auto.candidates]
    named = (given if isinstance(given, str) else scheme for given, scheme in schemes)
    return auto._replace(candidates=tuple(named))


def _rule(item: Any) -> Rule:
    if isinstance(item, Rule):
        return item
    if isinstance(item, tuple) and len(item) == 2 and isinstance(item[0], str):
        return _default_rule(item[1])._replace(pattern=item[0])
    raise OptionError(
        f"compression rule {item!r}: give only(pattern, compression) or a pair "
        "(pattern, compression)"
    )


def _default_rule(compression: Any) -> Rule:
    scheme = _scheme(compression)
    # A cast harms small parameters no more than large ones.
    if isinstance(scheme.compressor, Cast):
        return Rule(scheme, min_bytes=0, min_ndim=0)
    return Rule(scheme)


def _scheme(compression: Any) -> Scheme:
    if isinstance(compression, str | Mapping):
        return registry.make(compression)
    if isinstance(compression, Compressor | Scheme):
        return scheme_of(compression)
    raise OptionError(
        f"compression={compression!r}: give a name (valid: {', '.join(registry.names())}), "
        "name:key=value, a mapping with a 'name', a compressor, or a list of rules"
    )
