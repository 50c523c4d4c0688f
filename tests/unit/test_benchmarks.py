"""The tables that the benchmarks of compression print."""

import importlib
import sys
from pathlib import Path
from typing import Any

import pytest

FOLDER = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture
def load(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Import a script as the program that it is: its folder is on the path."""
    monkeypatch.syspath_prepend(FOLDER)
    yield importlib.import_module
    for name in ("printing", "convergence", "throttled", "compress"):
        sys.modules.pop(name, None)


def curves(*lasts: float) -> list[list[tuple[int, float]]]:
    """Return a curve for each seed, by its last value."""
    return [[(1, 0.5), (2, last)] for last in lasts]


def test_one_seed_has_no_deviation(load: Any) -> None:
    table = load("convergence").table("digits", {"none": curves(0.9), "int8": curves(0.8)}, 4)
    assert "1 seed" in table.title
    assert table.rows == [
        ["none", "0.9000", "", "+0.0000", ""],
        ["int8", "0.8000", "", "-0.1000", ""],
    ]


def test_the_distance_from_the_control_is_in_its_deviations(load: Any) -> None:
    found = {"none": curves(0.8, 0.9, 1.0), "int8": curves(0.7, 0.7, 0.7)}
    (control, other) = load("convergence").table("digits", found, 4).rows
    assert control == ["none", "0.9000", "0.1000", "+0.0000", "+0.0"]
    assert other == ["int8", "0.7000", "0.0000", "-0.2000", "-2.0"]
    found["none"] = curves(0.9, 0.9, 0.9)  # nothing to divide by
    assert [row[-1] for row in load("convergence").table("digits", found, 4).rows] == ["", ""]


def test_steps_are_compared_with_what_was_measured(load: Any) -> None:
    throttled = load("throttled")
    results = {"none": ([2.0, 2.0], 8e6), "auto": ([1.0, 1.0], 1e6), "ddp": ([4.0, 4.0], 0.0)}
    table = throttled.table("1gbit", 4, 2048, results)
    assert table.title == "4 hosts, links of 1gbit: a step of 25.2 million parameters"
    assert table.rows == [
        ["none", "2000 (2000-2000)", "8.00", "1.00 x", ""],
        ["auto", "1000 (1000-1000)", "1.00", "2.00 x", ""],
        ["ddp", "4000 (4000-4000)", "", "0.50 x", ""],
    ]


def test_every_compressor_is_a_peer(load: Any) -> None:
    from hpc_dl.compress import names

    throttled = load("throttled")
    assert {peer.partition(":")[0] for peer in throttled.OURS} == {"alone", "auto", *names()}


def test_kernels_in_numpy_stand_beside_the_compiled_ones(load: Any) -> None:
    bench = load("compress")
    seconds = bench.measure(1 << 12, 1, 1, ["onebit", "demo"])
    rows = {row[0]: row[1:] for row in bench.table(seconds, 1 << 12).rows}
    for name in ("onebit encode", "onebit decode", "demo encode", "demo decode"):
        assert all(float(cell) >= 0 for cell in rows[name])
    assert rows["copy"][-1] == ""  # it is NumPy's


def test_a_document_gets_the_same_table(load: Any) -> None:
    printing = load("printing")
    results = printing.Results("a title", ("what", "ms"), [["none", "1"], ["fp16", "2"]])
    assert printing.markdown(results).splitlines() == [
        "a title:",
        "",
        "| what | ms |",
        "| --- | ---: |",
        "| none | 1 |",
        "| fp16 | 2 |",
    ]
