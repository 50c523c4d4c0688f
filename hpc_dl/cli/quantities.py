"""Read quantities with units from the command line: ``25M``, ``10Gbit``, ``20us``."""

import re
from collections.abc import Mapping

import click

_PREFIXES = {"": 1.0, "k": 1e3, "K": 1e3, "M": 1e6, "G": 1e9, "T": 1e12}
_COUNTS = {**_PREFIXES, "B": 1e9}
_BANDWIDTHS = {
    **{f"{p}bit{end}": f / 8 for p, f in _PREFIXES.items() for end in ("", "/s")},
    **{f"{p}B/s": f for p, f in _PREFIXES.items()},
}
_DURATIONS = {"ns": 1e-9, "us": 1e-6, "ms": 1e-3, "s": 1.0}
_NUMBER = re.compile(r"\s*([0-9]*\.?[0-9]+(?:e[+-]?[0-9]+)?)\s*(.*?)\s*", re.IGNORECASE)


def count(text: str) -> float:
    """Read a number such as ``25M``."""
    return _read(text, "number", _COUNTS, "25M")


def bandwidth(text: str) -> float:
    """Read a bandwidth such as ``10Gbit`` or ``1.25GB/s``; return bytes a second."""
    return _read(text, "bandwidth", _BANDWIDTHS, "10Gbit or 1.25GB/s")


def duration(text: str) -> float:
    """Read a duration such as ``20us``; return seconds."""
    return _read(text, "duration", _DURATIONS, "20us")


def _read(text: str, kind: str, units: Mapping[str, float], example: str) -> float:
    """Return a positive number times the factor of its unit.

    Raises:
        BadParameter: anything else.
    """
    matched = _NUMBER.fullmatch(str(text))
    factor = units.get(matched.group(2)) if matched else None
    value = float(matched.group(1)) * factor if matched and factor else 0.0
    if not 0 < value < float("inf"):
        known = ", ".join(unit for unit in units if unit)
        raise click.BadParameter(
            f"{text!r} is no {kind}; write for example {example} (units: {known})"
        )
    return value
