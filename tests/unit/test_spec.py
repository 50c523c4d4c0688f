"""Spec strings: what parses, and what the errors say."""

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hpc_dl.errors import OptionError
from hpc_dl.spec import Spec, Value, check_options, parse

words = st.from_regex(r"[a-z][a-z0-9_]{0,8}", fullmatch=True)
values = st.one_of(
    st.booleans(), st.integers(), st.floats(allow_nan=False, allow_infinity=False)
) | words.filter(lambda w: w not in ("true", "false", "inf", "nan", "infinity"))


@given(words, st.dictionaries(words, values, max_size=4))
def test_parses_what_it_prints(name: str, options: dict[str, Value]) -> None:
    text = ",".join(f"{key}={value}" for key, value in options.items())
    parsed = parse(f"{name}:{text}" if options else name)
    assert parsed == Spec(name, options)
    assert all(type(parsed.options[key]) is type(value) for key, value in options.items())


def test_spaces_do_not_count() -> None:
    assert parse("  mpi : node_size = 2 , cuda=stage ") == parse("mpi:node_size=2,cuda=stage")


@pytest.mark.parametrize("text", ["", "  ", ":a=1", "mpi:", "mpi: "])
def test_bad_form(text: str) -> None:
    with pytest.raises(OptionError, match=re.escape(f"bad spec {text!r}; write name or name:")):
        parse(text)


@pytest.mark.parametrize("item", ["a", "a=", "=1", "="])
def test_bad_option(item: str) -> None:
    with pytest.raises(OptionError, match=re.escape(f"bad option {item!r} in spec")):
        parse(f"mpi:{item},b=2")


def test_option_twice() -> None:
    with pytest.raises(OptionError, match="'a' is given twice"):
        parse("mpi:a=1,a=2")


def test_unknown_option_lists_the_valid_ones() -> None:
    with pytest.raises(OptionError, match=r"unknown option 'x' for part 'p'; valid options: a, b"):
        check_options(parse("p:x=1"), "part", ["b", "a"])
    with pytest.raises(OptionError, match="valid options: none"):
        check_options(parse("p:x=1"), "part", [])
    check_options(parse("p:a=1"), "part", ["a"])
