"""Find compressors by name: built in, or from packages that are installed.

A package offers one with an entry point in the group ``hpc_dl.compressors``, whose name is
the compressor's and whose object is its class.
"""

import dataclasses
import functools
import importlib
import importlib.metadata
import logging
from collections.abc import Mapping
from typing import Any, get_type_hints

from hpc_dl.compress.base import Compressor
from hpc_dl.compress.scheme import (
    Scheme,
    error_feedback,
    momentum_correction,
    scheme_of,
    warmup,
)
from hpc_dl.errors import OptionError
from hpc_dl.spec import Spec, check_options, parse

log = logging.getLogger("hpc_dl.compress")

GROUP = "hpc_dl.compressors"

#: Name of a built-in compressor -> module and class.
BUILT_IN: dict[str, tuple[str, str]] = {
    "none": ("casts", "NoCompression"),
    "fp16": ("casts", "Float16"),
    "bf16": ("casts", "BFloat16"),
    "fp8": ("fp8", "Float8"),
    "int8": ("maxmin", "Int8"),
    "int4": ("maxmin", "Int4"),
    "qsgd": ("qsgd", "Qsgd"),
    "terngrad": ("terngrad", "TernGrad"),
    "natural": ("natural", "Natural"),
    "signsgd": ("signs", "SignSgd"),
    "onebit": ("signs", "OneBit"),
    "topk": ("topk", "TopK"),
    "threshold": ("threshold", "Threshold"),
    "randomk": ("randomk", "RandomK"),
    "dgc": ("dgc", "Dgc"),
    "powersgd": ("powersgd", "PowerSgd"),
    "sketch": ("sketch", "Sketch"),
    "demo": ("demo", "Demo"),
}


class _Required(str):
    """Stands for the default of an option that has none; it is known by its identity."""


REQUIRED = _Required("required")

#: Options that every scheme has, beside those of its compressor.
DECORATORS = {
    "error_feedback": "fp32, bf16, int8 or off: keep what was not sent, in this type",
    "momentum": "take momentum before compression; the optimizer must have none",
    "warmup": "steps at the beginning that send gradients as they are",
}


@functools.cache
def _plugins() -> dict[str, type[Compressor]]:
    """Load the compressors of other packages; one that fails is a warning."""
    found: dict[str, type[Compressor]] = {}
    for entry in importlib.metadata.entry_points(group=GROUP):
        try:
            loaded = _checked(entry.name, entry.load())
            if found.setdefault(entry.name, loaded) is not loaded:
                other = found[entry.name]
                raise ValueError(f"{other.__module__}.{other.__qualname__} has that name, too")
        except Exception as error:
            log.warning(
                "the compressor %r of %s is not available: %s: %s",
                entry.name,
                entry.dist.name if entry.dist is not None else entry.value,
                type(error).__name__,
                error,
            )
    return found


def _checked(name: str, found: Any) -> type[Compressor]:
    if not (isinstance(found, type) and issubclass(found, Compressor)):
        raise TypeError(f"{found!r} is no subclass of hpc_dl.compress.Compressor")
    if name in BUILT_IN:
        raise ValueError(f"{name!r} is the name of a built-in compressor")
    if getattr(found, "name", None) != name:
        raise ValueError(
            f"its name is {getattr(found, 'name', None)!r}, its entry point's {name!r}"
        )
    if not (dataclasses.is_dataclass(found) and _is_frozen(found)):
        raise TypeError(f"{found.__name__} is no frozen dataclass; write @dataclass(frozen=True)")
    return found


def _is_frozen(kind: type[Compressor]) -> bool:
    """Tell whether objects can be hashed, compared and shared."""
    return bool(kind.__dataclass_params__.frozen)  # type: ignore[attr-defined]


def names() -> list[str]:
    """Return the names of all compressors."""
    return [*BUILT_IN, *sorted(_plugins())]


def find(name: str) -> type[Compressor]:
    """Return a compressor's class.

    Raises:
        OptionError: there is none of this name.
    """
    if name in BUILT_IN:
        module, attribute = BUILT_IN[name]
        found: type[Compressor] = getattr(
            importlib.import_module(f"hpc_dl.compress.{module}"), attribute
        )
        return found
    if name == "auto":
        raise OptionError(
            "compression 'auto' stands alone, without options, for all gradients; where one "
            f"compressor is wanted, name it: {', '.join(names())}"
        )
    if name not in _plugins():
        raise OptionError.unknown("compression", name, [*names(), "auto"])
    return _plugins()[name]


def options_of(kind: type[Compressor]) -> dict[str, Any]:
    """Return a compressor's options and their defaults, ``REQUIRED`` where there is none."""
    every: tuple[dataclasses.Field[Any], ...] = dataclasses.fields(kind)  # type: ignore[arg-type]
    return {field.name: _default(field) for field in every if field.init}


def _default(field: dataclasses.Field[Any]) -> Any:
    if field.default_factory is not dataclasses.MISSING:
        return field.default_factory()
    return REQUIRED if field.default is dataclasses.MISSING else field.default


def make(spec: str | Mapping[str, Any] | Spec) -> Scheme:
    """Make a scheme.

    Args:
        spec: ``name:key=value,key=value``, or a mapping with ``name`` and options. Options
            are those of the compressor and ``DECORATORS``.

    Raises:
        OptionError: an unknown name or option, or a value that is not allowed.

    >>> make("topk:ratio=0.01,error_feedback=bf16").residual
    'bf16'
    """
    if isinstance(spec, str):
        spec = parse(spec)
    elif not isinstance(spec, Spec):
        given = dict(spec)
        if not isinstance(given.get("name"), str):
            raise OptionError(
                f"compression={spec!r}: a mapping needs a 'name'; {', '.join(names())}"
            )
        spec = Spec(given.pop("name"), given)
    kind = find(spec.name)
    known = options_of(kind)
    check_options(spec, "compression", {*known, *DECORATORS})
    # An option of the compressor itself goes to it, even where a decorator has the same name.
    own = {
        key: value for key, value in spec.options.items() if key in known or key not in DECORATORS
    }
    missing = [key for key, value in known.items() if value is REQUIRED and key not in own]
    if missing:
        form = ",".join(f"{key}=VALUE" for key in missing)
        raise OptionError(
            f"compression {spec.name!r} needs {', '.join(missing)}; write {spec.name}:{form}"
        )
    scheme = scheme_of(kind(**_typed(kind, own)))
    around = {key: value for key, value in spec.options.items() if key not in own}
    if "error_feedback" in around:
        scheme = error_feedback(scheme, _residual(around["error_feedback"]))
    if "momentum" in around:
        scheme = momentum_correction(scheme, _number(float, "momentum", around["momentum"]))
    if "warmup" in around:
        scheme = warmup(scheme, _number(int, "warmup", around["warmup"]))
    return scheme


def _residual(value: Any) -> str:
    if isinstance(value, bool):
        return "fp32" if value else "off"
    return str(value)


def _typed(kind: type[Compressor], options: Mapping[str, Any]) -> dict[str, Any]:
    hints = get_type_hints(kind)
    return {key: _number(hints[key], key, value) for key, value in options.items()}


def _number(wanted: Any, key: str, value: Any) -> Any:
    """Accept an int for a float; refuse anything else of another type."""
    if wanted is float and type(value) is int:
        return float(value)
    if wanted in (bool, int, float, str) and type(value) is not wanted:
        raise OptionError(f"option {key}={value!r}: give a {wanted.__name__}")
    return value
