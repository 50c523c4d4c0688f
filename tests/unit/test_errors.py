"""The tree of errors is the one that its file draws."""

import re

import pytest

from hpc_dl import errors
from hpc_dl.errors import HpcDlError, OptionError

CLASSES = {
    name: value
    for name, value in vars(errors).items()
    if isinstance(value, type) and issubclass(value, Exception)
}
#: (what stands before the name, the name, the built-in bases in parentheses)
LINES = re.findall(r"^([ │]*)[├└]── (\w+)(?: \(([\w, ]+)\))?", errors.__doc__ or "", re.MULTILINE)
DRAWN = {name: builtin for _, name, builtin in LINES}


def _drawn_parents() -> dict[str, str]:
    parents, path = {}, {-1: "HpcDlError"}
    for before, name, _ in LINES:
        parents[name] = path[max(depth for depth in path if depth < len(before))]
        path = {depth: n for depth, n in path.items() if depth < len(before)} | {len(before): name}
    return parents


def test_every_error_is_drawn() -> None:
    assert set(DRAWN) | {"HpcDlError"} == set(CLASSES)


@pytest.mark.parametrize("name", sorted(DRAWN))
def test_errors_are_what_is_drawn(name: str) -> None:
    bases = [base.__name__ for base in CLASSES[name].__bases__]
    assert bases == [_drawn_parents()[name], *filter(None, DRAWN[name].split(", "))]


@pytest.mark.parametrize("name", sorted(CLASSES))
def test_carries_its_message(name: str) -> None:
    error = CLASSES[name]("what was given")
    assert isinstance(error, HpcDlError)
    assert str(error) == "what was given"


def test_unknown_lists_the_choices_in_order() -> None:
    error = OptionError.unknown("op", "mean", ["sum", "average"])
    assert str(error) == "unknown op 'mean'; valid: average, sum"
    assert isinstance(error, ValueError)
