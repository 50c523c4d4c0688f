"""What the command line says about compressors, and what it predicts of them."""

import functools
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import click
import pytest
from click.testing import CliRunner, Result
from hypothesis import given, settings
from hypothesis import strategies as st

from hpc_dl.cli import main, quantities
from hpc_dl.cli import plan as plan_command
from hpc_dl.comm import Communicator
from hpc_dl.compress import Auto, Scheme, names
from hpc_dl.reduce import choose
from hpc_dl.reduce.cost import Work, network_of_link
from hpc_dl.reduce.measure import measure_work
from hpc_dl.testing import run_threads

pytestmark = pytest.mark.timeout(120)

PREFIXES = {"": 1.0, "k": 1e3, "M": 1e6, "G": 1e9, "T": 1e12}
#: Work at 1 GB/s of float32, but for casts.
QUICK = 1e-9

measured_once = functools.cache(functools.partial(measure_work, elements=1 << 16))


@pytest.fixture(autouse=True)
def _quick_work(monkeypatch: pytest.MonkeyPatch) -> None:
    def measured(scheme: Scheme, size: int, elements: int) -> Work:
        return measured_once(scheme, size)._replace(seconds=QUICK)

    monkeypatch.setattr(plan_command, "measure_work", measured)
    monkeypatch.setattr(plan_command, "measure_cast", lambda *_: 0.0)


def run(*arguments: str) -> Result:
    return CliRunner().invoke(main, arguments)


def plan(*options: str, params: str = "25M", ranks: int = 8, bandwidth: str = "1Gbit") -> Result:
    given = ["--params", params, "--ranks", str(ranks), "--bandwidth", bandwidth]
    return run("plan", *given, *options)


def rows(*options: str, **given: Any) -> dict[str, dict[str, Any]]:
    done = plan(*options, "--json", **given)
    assert done.exit_code == 0, done.output
    return {row["compression"]: row for row in json.loads(done.stdout)}


def best(found: dict[str, dict[str, Any]]) -> str:
    (chosen,) = (name for name, row in found.items() if row["best"])
    return chosen


@pytest.mark.parametrize("arguments", [["compress"], ["compress", "list"], ["plan"]], ids=" ".join)
def test_help_has_examples(arguments: list[str]) -> None:
    done = run(*arguments, "--help")
    assert done.exit_code == 0
    assert "Examples:" in done.output
    assert " ".join(["hpc-dl", *arguments]) in done.output


# --- compress list ------------------------------------------------------------------


def test_list_has_each_compressor_with_its_ratio() -> None:
    facts = {item["name"]: item for item in json.loads(run("compress", "list", "--json").stdout)}
    assert list(facts) == names()
    ratios = {name: item["ratio"] for name, item in facts.items()}
    assert (ratios["none"], ratios["fp16"], ratios["signsgd"]) == (1, 2, 32)
    assert ratios["onebit"] == pytest.approx(4 / (1 / 8 + 4 / 1024))
    assert ratios["powersgd"] == pytest.approx(1024**2 / (2 * 1024 * 4))
    assert ratios["threshold"] is None  # depends on the data
    assert facts["topk"]["options"] == {"ratio": 0.01, "sample": True}
    assert facts["topk"]["error_feedback"]
    assert not facts["int8"]["error_feedback"]
    assert all(item["summary"] and item["class"] for item in facts.values())


def test_list_is_readable_in_a_pipe() -> None:
    """As wide as its lines: each compressor has one, and none is wrapped."""
    done = subprocess.run(
        [sys.executable, "-m", "hpc_dl.cli", "compress", "list"],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
        env=_without_columns(),
    )
    table, _, rest = done.stdout.partition("\n\n")
    lines = table.splitlines()[2:]  # after the title and a rule
    assert [line.split()[0] for line in lines] == names()
    assert any("entries of largest magnitude" in line for line in lines)
    assert "\x1b" not in done.stdout
    for option in ("error_feedback", "momentum", "warmup", "auto"):
        assert option in rest


def test_list_is_as_wide_as_one_says(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "70")
    assert max(map(len, run("compress", "list").stdout.splitlines())) <= 70


def _without_columns() -> dict[str, str]:
    return {key: value for key, value in os.environ.items() if key != "COLUMNS"}


# --- plan ---------------------------------------------------------------------------


def test_the_best_of_a_slow_link_is_strong_and_of_a_fast_one_none() -> None:
    slow = rows(bandwidth="10Mbit")
    assert slow[best(slow)]["sent"] < slow["none"]["sent"] / 20
    fast = rows(bandwidth="100Tbit", ranks=2)
    assert best(fast) == "none"


@pytest.mark.parametrize("bandwidth", ["10Mbit", "1Gbit", "40Gbit", "10Tbit"])
def test_the_marked_one_is_the_best(bandwidth: str) -> None:
    found = rows(bandwidth=bandwidth)
    assert list(found) == list(plan_command.CANDIDATES)
    chosen = found[best(found)]["step"]
    assert chosen <= 1.031 * min(row["step"] for row in found.values())


def test_ratios_are_those_of_the_bytes() -> None:
    found = rows()
    ratios = {name: found["none"]["sent"] / row["sent"] for name, row in found.items()}
    assert ratios["none"] == 1
    assert ratios["fp16"] == pytest.approx(2, rel=1e-3)  # padded
    assert ratios["onebit"] == pytest.approx(31, rel=0.01)
    assert found["none"]["sent"] == pytest.approx(2 * 7 / 8 * 4 * 25e6, rel=0.01)


@settings(deadline=None)
@given(st.integers(1, 10**9))
def test_the_model_has_as_many_parameters_as_one_says(params: int) -> None:
    parameters = plan_command._parameters(params)
    assert sum(p.size for p in parameters) == pytest.approx(params, rel=0.01, abs=1 + params**0.5)
    assert all(max(p.shape) <= plan_command.SIDE for p in parameters)


def test_a_model_of_small_matrices_is_not_compressed() -> None:
    """As by rule in training: ten thousand values are one matrix of 40 KB."""
    found = rows(params="10k")
    assert {row["sent"] for name, row in found.items() if name != "fp16"} == {found["none"]["sent"]}
    assert best(found) == "none"


def test_casts_are_priced(monkeypatch: pytest.MonkeyPatch) -> None:
    """By the kernels that casts have, once for each type."""
    asked: list[str] = []

    def measured(dtype: str, elements: int) -> float:
        asked.append(dtype)
        return 1e-9

    monkeypatch.setattr(plan_command, "measure_cast", measured)
    found = rows("--compression", "none", "--compression", "fp16", "--compression", "bf16")
    assert asked == ["float16", "bfloat16"]
    assert found["fp16"]["kernels"] == found["bf16"]["kernels"] == pytest.approx(0.1, rel=0.01)
    assert found["none"]["kernels"] == 0


def test_the_table_is_that_of_the_automatic_choice(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Columns, figures and the mark: of the same model, network and work."""
    specs = ("none", "fp16", "onebit")

    def worked(scheme: Scheme, size: int, *rest: Any) -> Work:
        return measured_once(scheme, size)._replace(seconds=QUICK)

    monkeypatch.setattr(
        choose, "measure_network", lambda comm, *_: network_of_link(comm.size, 1.25e8, 2e-5)
    )
    monkeypatch.setattr(choose, "measure_work", worked)
    monkeypatch.setattr(choose, "measure_cast", lambda *_: 0.0)
    monkeypatch.setattr(choose.os, "sched_getaffinity", lambda pid: range(8))
    now = [0.0]
    monkeypatch.setattr(choose, "time", SimpleNamespace(perf_counter=lambda: now[0]))
    parameters = plan_command._parameters(4_000_000)

    def main(comm: Communicator) -> None:
        chooser = choose.Chooser(Auto(candidates=specs, steps=3))
        for _ in range(4):
            chooser.step(0.0, 0.0)
        chooser.choose(comm, parameters, plan_command.BUCKET_BYTES)

    with caplog.at_level("INFO", "hpc_dl.compress"):
        run_threads(2, main)
    logged = caplog.records[0].getMessage().splitlines()[1:]
    options = [part for spec in specs for part in ("--compression", spec)]
    done = plan(*options, "--compute", "1ns", params="4M", ranks=2)
    assert done.stdout.splitlines() == logged


def test_the_table_compares_with_the_first_where_none_is_no_candidate() -> None:
    said = plan("--compression", "topk:ratio=0.001", "--compression", "onebit").stdout
    assert "than topk:ratio=0.001" in said
    assert "than none" not in said
    assert said.count("<-") == 1
    said = plan().stdout
    assert "than none" in said
    assert "than fp16" in said


def test_candidates_of_ones_own() -> None:
    found = rows("--compression", "none", "--compression", "powersgd:rank=2,warmup=5")
    assert list(found) == ["none", "powersgd:rank=2,warmup=5"]
    assert "rank=2" in found["powersgd:rank=2,warmup=5"]["scheme"]


def test_kernels_cost_where_no_core_is_spare() -> None:
    """Of a step whose communication is all hidden, kernels are the only cost."""
    given = {"bandwidth": "10Gbit", "ranks": 4}
    spare, busy = rows("--compute", "2s", **given), rows("--compute", "2s", "--busy-cores", **given)
    assert busy["int8"]["step"] > spare["int8"]["step"]
    assert busy["none"]["step"] == spare["none"]["step"]


def test_more_compute_hides_more() -> None:
    short, long = rows("--compute", "100ms"), rows("--compute", "1s")
    for name, row in long.items():
        assert row["step"] - 1.0 <= short[name]["step"] - 0.1


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"params": "many"}, "'many' is no number; write for example 25M"),
        ({"params": "-3"}, "'-3' is no number"),
        ({"params": "0"}, "'0' is no number"),
        ({"bandwidth": "10"}, "write for example 10Gbit or 1.25GB/s"),
        ({"bandwidth": "10GB"}, "GB/s"),
        ({"ranks": 1}, "1 is not in the range x>=2"),
    ],
)
def test_bad_quantities_are_one_message(given: dict[str, Any], said: str) -> None:
    done = plan(**given)
    assert done.exit_code == 2
    assert said in " ".join(done.stderr.split())
    assert f"--{next(iter(given))}" in done.stderr


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--compression", "topkk"], "unknown compression 'topkk'; valid: auto, bf16, "),
        (["--compression", "topk:rato=1"], "valid options: error_feedback, momentum, ratio"),
        (["--compression", "topk:ratio=2"], "above 0 up to 1"),
        (["--compression", "auto"], "stands alone"),
        (["--latency", "20"], "'20' is no duration; write for example 20us (units: ns"),
    ],
)
def test_bad_options_are_one_message(options: list[str], said: str) -> None:
    done = plan(*options)
    assert done.exit_code == 2
    assert said in " ".join(done.stderr.split())
    assert done.stdout == ""


# --- quantities ---------------------------------------------------------------------

POSITIVE = st.floats(1e-6, 1e12) | st.integers(1, 10**15)


@settings(deadline=None)
@given(POSITIVE, st.sampled_from(sorted(PREFIXES)), st.sampled_from(["", " "]))
def test_numbers_with_prefixes(value: float, prefix: str, space: str) -> None:
    text = f"{value}{space}{prefix}"
    assert quantities.count(text) == pytest.approx(value * PREFIXES[prefix])


@settings(deadline=None)
@given(POSITIVE, st.sampled_from(sorted(PREFIXES)), st.sampled_from(["bit", "bit/s", "B/s"]))
def test_bandwidths_are_bytes_a_second(value: float, prefix: str, unit: str) -> None:
    found = quantities.bandwidth(f"{value}{prefix}{unit}")
    assert found == pytest.approx(value * PREFIXES[prefix] / (1 if unit == "B/s" else 8))


@settings(deadline=None)
@given(POSITIVE, st.sampled_from([("ns", 1e-9), ("us", 1e-6), ("ms", 1e-3), ("s", 1.0)]))
def test_durations_are_seconds(value: float, unit: tuple[str, float]) -> None:
    assert quantities.duration(f" {value}{unit[0]} ") == pytest.approx(value * unit[1])


def test_a_billion_has_two_names() -> None:
    assert quantities.count("1.3B") == quantities.count("1.3G") == 1.3e9


def _texts() -> Iterator[st.SearchStrategy[str]]:
    yield st.text(max_size=12)
    yield st.from_regex(r"[-+]?[0-9.e]{0,6}[kKMGTBbits/unm ]{0,6}", fullmatch=True)
    numbers = st.floats().map(str) | st.integers(-400, 400).map(lambda e: f"1e{e}")
    units = st.sampled_from(["", "k", "T", "Gbit", "bit", "TB/s", "ns", "s"])
    yield st.tuples(numbers, units).map("".join)


@settings(deadline=None)
@given(st.one_of(*_texts()))
def test_a_quantity_is_positive_or_refused(text: str) -> None:
    for read in (quantities.count, quantities.bandwidth, quantities.duration):
        try:
            value = read(text)
        except click.BadParameter:
            continue
        assert 0 < value < float("inf")
