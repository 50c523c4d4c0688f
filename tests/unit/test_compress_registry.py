"""Names, options and decorators; random numbers by key; residuals in three types."""

import json
import logging
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any, ClassVar

import numpy as np
import pytest
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st

from hpc_dl.cli import main
from hpc_dl.compress import (
    Bytes,
    Codec,
    Compressor,
    Floats,
    Limits,
    Scheme,
    Unit,
    error_feedback,
    make,
    momentum_correction,
    names,
    policy_of,
    registry,
    warmup,
)
from hpc_dl.compress.dgc import Dgc
from hpc_dl.compress.random import generator, hashed, key_of, uniform
from hpc_dl.compress.residual import Residual, make_residual
from hpc_dl.compress.scheme import RESIDUALS, scheme_of
from hpc_dl.compress.signs import OneBit
from hpc_dl.compress.topk import TopK
from hpc_dl.errors import OptionError
from hpc_dl.testing.same import assert_same_bytes

# --- names ------------------------------------------------------------------------------


@pytest.mark.parametrize("name", registry.BUILT_IN)
def test_built_in(name: str) -> None:
    """Each is what its entry says, has defaults for all options, and describes itself."""
    kind = registry.find(name)
    assert issubclass(kind, Compressor)
    assert kind.name == name
    assert kind.summary
    assert make(name).compressor == kind()
    assert make({"name": name, **registry.options_of(kind)}).compressor == kind()


def test_unknown_name_lists_the_known_ones() -> None:
    with pytest.raises(OptionError, match=r"unknown compression 'topkk'.*onebit.*topk"):
        make("topkk")


@pytest.mark.parametrize(
    ("spec", "said"),
    [
        ("topk:ration=0.1", "unknown option 'ration'.*error_feedback.*ratio"),
        ("topk:ratio=0", "ratio=0"),
        ("topk:ratio=nan", "ratio=nan"),
        ("topk:ratio=much", "ratio='much': give a float"),
        ("topk:ratio=true", "ratio=True: give a float"),
        ("topk:sample=1", "sample=1: give a bool"),
        ("powersgd:rank=2.5", "rank=2.5: give a int"),
        ("onebit:error_feedback=fp64", "unknown residual 'fp64'; valid: bf16, fp32, int8, off"),
        ("onebit:momentum=0.9", "compressors that select entries"),
        ("topk:momentum=1", "momentum=1.0"),
        ("topk:warmup=-1", "warmup=-1"),
        ("topk:warmup=1.5", "warmup=1.5: give a int"),
        ("demo:momentum=0.5", "momentum of its own"),
        ({"ratio": 0.1}, "a mapping needs a 'name'"),
        ({"name": 3}, "a mapping needs a 'name'"),
        ({"name": "topk", "ratio": "0.1"}, "give a float"),
    ],
)
def test_bad_specs(spec: str | Mapping[str, Any], said: str) -> None:
    with pytest.raises(OptionError, match=said):
        make(spec)


def test_error_of_an_option_names_each_valid_one_once() -> None:
    with pytest.raises(OptionError) as caught:
        make("dgc:x=1")
    listed = str(caught.value).partition("valid options: ")[2].split(", ")
    assert len(listed) == len(set(listed)) > 3


def test_specs_and_mappings_are_the_same() -> None:
    scheme = make("topk:ratio=1,error_feedback=bf16,warmup=3,momentum=0.5")
    assert scheme == Scheme(TopK(ratio=1.0), "bf16", 0.5, 3)
    given = {"name": "topk", "ratio": 1, "error_feedback": "bf16", "warmup": 3, "momentum": 0.5}
    before = dict(given)
    assert make(given) == scheme
    assert given == before


@pytest.mark.parametrize(
    ("given", "kept"), [("true", "fp32"), ("false", "off"), ("off", "off"), ("int8", "int8")]
)
def test_error_feedback_by_spec(given: str, kept: str) -> None:
    assert make(f"int8:error_feedback={given}").residual == kept


def test_an_option_of_the_compressor_goes_to_it() -> None:
    """DGC has a momentum, and so has every scheme."""
    scheme = make("dgc:momentum=0.5")
    assert scheme.compressor == Dgc(momentum=0.5)
    assert scheme.momentum == 0.5


# --- decorators -------------------------------------------------------------------------


def test_decorators_read_from_the_inside_out() -> None:
    scheme = warmup(error_feedback(momentum_correction(TopK(), 0.8), "bf16"), 100)
    assert scheme == Scheme(TopK(), "bf16", 0.8, 100)
    assert scheme_of(scheme) is scheme
    assert scheme_of(OneBit()).residual == "fp32"
    assert scheme_of(make("int8").compressor).residual == "off"


@pytest.mark.parametrize("spec", ["dgc", "demo"])
def test_a_second_momentum_is_refused(spec: str) -> None:
    scheme = make(spec)
    with pytest.raises(OptionError, match="momentum of its own"):
        momentum_correction(scheme, 0.3)
    assert momentum_correction(scheme, scheme.compressor.default_momentum) == scheme


@pytest.mark.parametrize("value", [-0.1, 1.0, float("nan")])
def test_bad_momentum(value: float) -> None:
    with pytest.raises(OptionError, match="momentum="):
        momentum_correction(TopK(), value)


# --- other packages ---------------------------------------------------------------------


@dataclass(frozen=True)
class Halves(Codec):
    """A compressor of another package."""

    times: int = 1
    name: ClassVar[str] = "halves"

    def payload_bytes(self, unit: Unit, size: int) -> float:
        return 2 * unit.size

    def encode(self, x: Floats, key: int) -> Bytes:
        return x.astype(np.float16).view(np.uint8)

    def decode(self, payload: Bytes, out: Floats) -> None:
        out[:] = payload.view(np.float16)


@dataclass(frozen=True)
class Needs(Halves):
    """One that has no default for an option, and a function for another's."""

    level: int = field(kw_only=True)
    steps: tuple[int, ...] = field(default_factory=lambda: (1, 2))
    counted: int = field(default=0, init=False)
    name: ClassVar[str] = "needs"


@dataclass(frozen=True)
class Others(Halves):
    """Another compressor that calls itself so."""


class Bare(Codec):
    """Not a dataclass."""

    name: ClassVar[str] = "bare"


@dataclass
class Changing(Bare):
    """Not frozen."""

    name: ClassVar[str] = "changing"


@pytest.fixture
def entries(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Any]]:
    """Let the environment's entry points be those of a list."""
    found: list[Any] = []
    monkeypatch.setattr(registry.importlib.metadata, "entry_points", lambda group: found)
    registry._plugins.cache_clear()
    yield found
    registry._plugins.cache_clear()


def entry(name: str, thing: Any, package: str = "a-package") -> Any:
    def load() -> Any:
        if isinstance(thing, Exception):
            raise thing
        return thing

    dist = SimpleNamespace(name=package)
    return SimpleNamespace(name=name, load=load, value="module:Thing", dist=dist)


def test_a_plugin_is_found(entries: list[Any]) -> None:
    entries.append(entry("halves", Halves))
    assert names() == [*registry.BUILT_IN, "halves"]
    assert make("halves:times=2,error_feedback=fp32") == Scheme(Halves(2), "fp32")


def test_a_plugin_may_require_options(entries: list[Any]) -> None:
    entries.append(entry("needs", Needs))
    assert registry.options_of(Needs) == {"times": 1, "level": registry.REQUIRED, "steps": (1, 2)}
    assert make("needs:level=3").compressor == Needs(level=3)
    for spec in ("needs", "needs:times=2", {"name": "needs"}):
        with pytest.raises(OptionError, match="'needs' needs level; write needs:level=VALUE"):
            make(spec)
    with pytest.raises(OptionError, match=r"valid options: .*level, .*steps"):
        make("needs:level=3,counted=1")


def test_an_option_of_a_plugin_is_not_taken_for_the_seed_of_all(entries: list[Any]) -> None:
    @dataclass(frozen=True)
    class Seeded(Halves):
        seed: int = 0
        name: ClassVar[str] = "seeded"

    entries.append(entry("seeded", Seeded))
    policy = policy_of({"name": "seeded", "seed": 5, "limits": {"every": 2}})
    assert policy == policy_of(Seeded(seed=5), limits=Limits(every=2))


def test_a_plugin_that_requires_options_is_listed(entries: list[Any]) -> None:
    entries.append(entry("needs", Needs))
    done = CliRunner().invoke(main, ["compress", "list"])
    assert done.exit_code == 0, done.output
    (line,) = [line for line in done.output.splitlines() if line.split()[:1] == ["needs"]]
    assert "level=required" in line
    assert "steps=(1, 2)" in line
    done = CliRunner().invoke(main, ["compress", "list", "--json"])
    facts = {item["name"]: item for item in json.loads(done.stdout)}
    assert facts["needs"]["options"] == {"times": 1, "level": "required", "steps": [1, 2]}
    assert facts["needs"]["ratio"] is None


@pytest.mark.parametrize(
    ("name", "thing", "said"),
    [
        ("halves", ImportError("no such library"), "ImportError: no such library"),
        ("halves", ZeroDivisionError("on purpose"), "ZeroDivisionError: on purpose"),
        ("other", Halves, "its name is 'halves', its entry point's 'other'"),
        ("topk", Halves, "name of a built-in compressor"),
        ("bare", Bare, r"write @dataclass\(frozen=True\)"),
        ("changing", Changing, r"write @dataclass\(frozen=True\)"),
        ("halves", dict, "no subclass of hpc_dl.compress.Compressor"),
        ("halves", 3, "no subclass of hpc_dl.compress.Compressor"),
    ],
)
def test_a_bad_plugin_is_one_warning(
    entries: list[Any], caplog: pytest.LogCaptureFixture, name: str, thing: Any, said: str
) -> None:
    entries.append(entry(name, thing))
    with caplog.at_level(logging.WARNING):
        assert names() == names() == list(registry.BUILT_IN)
    (message,) = [record.getMessage() for record in caplog.records]
    assert name in message
    assert "a-package" in message
    assert re.search(said, message)
    assert make("topk").compressor == TopK()


def test_a_plugin_that_fails_harms_no_other(
    entries: list[Any], caplog: pytest.LogCaptureFixture
) -> None:
    entries += [entry("bad", ImportError("x")), entry("halves", Halves)]
    assert names()[-1] == "halves"
    with pytest.raises(OptionError, match="unknown compression 'bad'"):
        make("bad")


def test_two_plugins_of_one_name(entries: list[Any], caplog: pytest.LogCaptureFixture) -> None:
    """Which one it would be depends on the order of folders, which may differ by rank."""
    entries += [entry("halves", Halves, "one"), entry("halves", Others, "two")]
    assert "halves" in names()
    assert make("halves").compressor == Halves()
    (message,) = [record.getMessage() for record in caplog.records]
    assert "two" in message
    assert "Halves has that name, too" in message


def test_one_plugin_found_twice(entries: list[Any], caplog: pytest.LogCaptureFixture) -> None:
    """As where two folders of the path hold it."""
    entries += [entry("halves", Halves), entry("halves", Halves)]
    assert names()[-1] == "halves"
    assert not caplog.records


# --- random numbers ---------------------------------------------------------------------

keys = st.integers(0, 2**32 - 1)


@given(keys, st.integers(0, 300), st.integers(0, 1000))
def test_numbers_do_not_depend_on_where_one_begins(key: int, skipped: int, start: int) -> None:
    whole = uniform(key, 400, start)
    assert_same_bytes(whole[skipped:], uniform(key, 400 - skipped, start + skipped))
    assert whole.dtype == np.float32
    assert ((whole >= 0) & (whole < 1)).all()


@given(keys)
def test_numbers_are_spread_evenly(key: int) -> None:
    """Within six standard deviations of mean and variance, in halves that do not correlate."""
    x = uniform(key, 20_000).astype(np.float64)
    assert abs(x.mean() - 0.5) < 6 * np.sqrt(1 / 12 / 20_000)
    assert abs(x.var() - 1 / 12) < 6 * np.sqrt(1 / 180 / 20_000)
    assert abs(np.corrcoef(x[:-1], x[1:])[0, 1]) < 6 / np.sqrt(20_000)


def test_hash_is_one_to_one_and_leaves_counters_alone() -> None:
    counters = np.arange(1 << 16, dtype=np.uint32)
    before = counters.copy()
    assert len(np.unique(hashed(12345, counters))) == len(counters)
    assert (counters == before).all()
    # Fixed for good: other ranks, and steps after a restart, must draw the same.
    known = [148231923, 1472893180, 1294806142]
    assert hashed(7, np.arange(3, dtype=np.uint32)).tolist() == known
    assert key_of(0, "weight", 3) == 1619465365


@given(st.lists(st.one_of(st.integers(), st.text(max_size=5)), min_size=1, max_size=4))
def test_keys(parts: list[Any]) -> None:
    assert key_of(*parts) == key_of(*parts) < 2**32
    assert key_of(*parts, "more") != key_of(*parts)
    assert generator(*parts).random() == generator(*parts).random()


def test_parts_of_a_key_are_kept_apart() -> None:
    assert len({key_of(1, 23), key_of(12, 3), key_of(123), key_of(3, 12)}) == 4


# --- residuals --------------------------------------------------------------------------


def residual(kind: str, size: int) -> Residual:
    found = make_residual(kind, size)
    assert found is not None
    return found


@pytest.mark.parametrize(
    ("kind", "error", "nbytes"),
    [("fp32", 0.0, 4 * 3001), ("bf16", 2.0**-8, 2 * 3001), ("int8", 1 / 253, 3001 + 3 * 4)],
)
def test_residual_keeps(kind: str, error: float, nbytes: int) -> None:
    x = np.random.default_rng(0).standard_normal(3001).astype(np.float32)
    kept = residual(kind, 3001)
    assert not kept.load().any()
    kept.store(x)
    bound = np.abs(x).max() if kind == "int8" else np.abs(x)
    assert (np.abs(kept.load() - x) <= error * bound).all()
    assert kept.nbytes == nbytes
    lent = kept.load()
    before = lent.copy()
    lent += 1  # it belongs to the caller
    assert_same_bytes(kept.load(), before)


@pytest.mark.parametrize("kind", ["fp32", "bf16", "int8"])
@given(seed=st.integers(0, 2**31), scale=st.floats(-30, 25), size=st.integers(0, 2100))
def test_residual_that_is_stored_again_is_the_same(
    kind: str, seed: int, scale: float, size: int
) -> None:
    """What is saved and taken up again goes on as if nothing had happened."""
    x = np.random.default_rng(seed).standard_normal(size).astype(np.float32)
    one, two = residual(kind, size), residual(kind, size)
    one.store(x * np.float32(10.0**scale))
    two.store(one.load())
    assert_same_bytes(one.load(), two.load())


@pytest.mark.parametrize("kind", RESIDUALS)
def test_residual_of_no_elements(kind: str) -> None:
    kept = make_residual(kind, 0)
    if kept is None:
        assert kind == "off"
    else:
        kept.store(np.empty(0, np.float32))
        assert len(kept.load()) == 0
