"""Read a spec string ``name:key=value,key=value``: how users name a part and its options."""

from collections.abc import Iterable, Mapping
from typing import NamedTuple

from hpc_dl.errors import OptionError

Value = bool | int | float | str


class Spec(NamedTuple):
    """A part's name and its options."""

    name: str
    options: Mapping[str, Value]


def _value(text: str) -> Value:
    lowered = text.lower()
    if lowered in ("true", "false"):
        return lowered == "true"
    for convert in (int, float):
        try:
            return convert(text)
        except ValueError:
            continue
    return text


def parse(text: str) -> Spec:
    """Parse a spec string.

    Args:
        text: ``name`` or ``name:key=value,key=value``. Values become ``bool``, ``int``,
            ``float`` or stay ``str``.

    Raises:
        OptionError: the text is not of that form, or gives a key twice.

    >>> parse("mpi:node_size=2,cuda=stage")
    Spec(name='mpi', options={'node_size': 2, 'cuda': 'stage'})
    """
    name, colon, rest = text.partition(":")
    name = name.strip()
    if not name or (colon and not rest.strip()):
        raise OptionError(f"bad spec {text!r}; write name or name:key=value,key=value")
    options: dict[str, Value] = {}
    for item in filter(None, (part.strip() for part in rest.split(","))):
        key, equals, value = (part.strip() for part in item.partition("="))
        if not equals or not key or not value:
            raise OptionError(f"bad option {item!r} in spec {text!r}; write key=value")
        if key in options:
            raise OptionError(f"option {key!r} is given twice in spec {text!r}; keep one")
        options[key] = _value(value)
    return Spec(name, options)


def check_options(spec: Spec, kind: str, valid: Iterable[str]) -> None:
    """Refuse an option that ``spec.name`` does not have, listing the valid ones."""
    valid = sorted(valid)
    for key in spec.options:
        if key not in valid:
            known = ", ".join(valid) or "none"
            raise OptionError(
                f"unknown option {key!r} for {kind} {spec.name!r}; valid options: {known}"
            )
