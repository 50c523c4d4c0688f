"""What a person sees of a run, and what it records."""

import fcntl
import io
import json
import os
import pty
import struct
import subprocess
import sys
import termios
import time
from pathlib import Path

import pytest
from rich.console import Console

from hpc_dl.observe import Progress, Run, read_metrics
from hpc_dl.observe.progress import describe
from hpc_dl.observe.stopwatch import Stopwatch

EPOCHS, STEPS, IMAGES = 3, 4, 32


def screen(terminal: bool) -> Console:
    return Console(file=io.StringIO(), force_terminal=terminal, width=100, color_system=None)


def text(console: Console) -> str:
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def run_all(folder: Path | None, console: Console) -> Run:
    with Run(folder, EPOCHS, STEPS, console) as run:
        for epoch in range(1, EPOCHS + 1):
            run.resume()
            for _ in range(STEPS):
                run.step(IMAGES, lambda epoch=epoch: {"loss": 1 / epoch, "accuracy": 0.5})
            run.pause()
            run.record({"loss": 1 / epoch, "accuracy": 0.5, "test_accuracy": float("nan")})
        run.finish({"job": "a job", "world_size": 2, "comm": "mpi", "bytes_sent": 12})
    return run


def test_a_run_writes_what_it_promises(tmp_path: Path) -> None:
    run = run_all(tmp_path, screen(terminal=False))
    assert run.epoch == EPOCHS
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "curve.png",
        "metrics.jsonl",
        "summary.json",
    ]
    records = read_metrics(tmp_path / "metrics.jsonl")
    assert [record["epoch"] for record in records] == [1, 2, 3]
    assert [record["test_accuracy"] for record in records] == [None] * EPOCHS
    assert all(record["images_per_second"] > 0 for record in records)
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary["comm"] == "mpi"
    assert summary["seconds"] == pytest.approx(records[-1]["seconds"], rel=0.5)
    assert summary["images_per_second"] > 0


def test_elsewhere_than_on_a_terminal_each_epoch_is_one_line(tmp_path: Path) -> None:
    console = screen(terminal=False)
    run_all(tmp_path, console)
    lines = text(console).splitlines()
    assert [line[:26] for line in lines[:EPOCHS]] == [
        "epoch 1/3  loss 1.0000  ac",
        "epoch 2/3  loss 0.5000  ac",
        "epoch 3/3  loss 0.3333  ac",
    ]
    assert all(line.endswith("images/s") for line in lines[:EPOCHS])
    assert "2 (communicator mpi)" in text(console)
    assert "\x1b" not in text(console)


def test_on_a_terminal_there_is_one_bar(tmp_path: Path) -> None:
    console = screen(terminal=True)
    run_all(tmp_path, console)
    shown = text(console)
    assert "epoch 3/3" in shown
    assert "100%" in shown
    assert "loss 0.3333  accuracy 0.5000" in shown
    bars, _, table = shown.rpartition("100%")
    assert "\n" not in bars.strip()  # drawn over and over on one line
    assert "a job" in table


def test_other_ranks_show_and_write_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    console = screen(terminal=True)
    run_all(None, console)
    assert text(console) == ""
    assert not list(tmp_path.iterdir())


def test_other_ranks_never_ask_for_metrics() -> None:
    """On a GPU each look at them would wait for it."""
    with Run(None, 1, 1, screen(terminal=True)) as run:
        run.step(1, lambda: pytest.fail("asked"))


def test_a_terminal_is_not_redrawn_for_each_step() -> None:
    asked = 0

    def values() -> dict[str, float]:
        nonlocal asked
        asked += 1
        return {"loss": 0.0}

    start = time.monotonic()
    with Progress(1, 2000, screen(terminal=True)) as progress:
        for _ in range(2000):
            progress.step(1, values)
    assert asked <= 2 + 10 * (time.monotonic() - start)


def test_an_error_leaves_the_screen_in_order_and_the_metrics_closed(tmp_path: Path) -> None:
    console = screen(terminal=True)

    def train() -> None:
        with Run(tmp_path, 1, 1, console) as run:
            run.record({"loss": 1.0})
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        train()
    assert text(console).endswith("\x1b[?25h")  # the cursor is visible again
    assert read_metrics(tmp_path / "metrics.jsonl")[0]["loss"] == 1.0
    assert not (tmp_path / "summary.json").exists()


def test_the_first_step_is_no_speed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It includes compilation: 10 s here, against 1 s for each of the others."""
    now = 0.0
    monkeypatch.setattr(time, "perf_counter", lambda: now)
    with Run(tmp_path, epochs=2, steps=2, console=screen(terminal=False)) as run:
        for seconds in (10, 1, 1, 1):
            run.resume()
            now += seconds
            run.step(IMAGES, dict)
            run.pause()
            now += 100  # an evaluation
            if seconds != 10:
                run.record({})
        run.finish({})
    speeds = [r["images_per_second"] for r in read_metrics(tmp_path / "metrics.jsonl")]
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert speeds == [IMAGES] * 3
    assert (summary["images_per_second"], summary["seconds"]) == (IMAGES, 13)


def test_a_single_step_has_no_speed(tmp_path: Path) -> None:
    with Run(tmp_path, epochs=1, steps=1, console=screen(terminal=False)) as run:
        run.resume()
        run.step(IMAGES, dict)
        run.record({"loss": 1.0})
        run.finish({})
    assert json.loads((tmp_path / "summary.json").read_text())["images_per_second"] is None


def test_the_clock_runs_between_resume_and_pause(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 100.0
    monkeypatch.setattr(time, "perf_counter", lambda: now)
    watch = Stopwatch()
    assert watch.seconds == 0
    watch.resume()
    now += 2
    assert watch.seconds == 2
    watch.resume()
    now += 3
    watch.pause()
    now += 50
    watch.pause()
    assert watch.seconds == 5
    watch.resume()
    now += 1
    assert watch.seconds == 6


@pytest.mark.parametrize(("columns", "drawn"), [(0, False), (120, True)])
def test_a_terminal_without_a_size_counts_as_a_file(columns: int, drawn: bool) -> None:
    """Open MPI's mpirun makes one even where its output goes into a file."""
    master, slave = pty.openpty()
    size = struct.pack("HHHH", 30 if columns else 0, columns, 0, 0)
    fcntl.ioctl(slave, termios.TIOCSWINSZ, size)
    script = "from hpc_dl.observe.screen import own_console; print(own_console().is_terminal)"
    with open(master, "rb", buffering=0) as end:
        subprocess.run([sys.executable, "-c", script], stdout=slave, timeout=60, check=True)
        os.close(slave)
        assert end.read(100).decode().strip() == str(drawn)


@pytest.mark.parametrize(
    ("values", "line"),
    [
        ({"loss": 0.5, "test_accuracy": None}, "loss 0.5000"),
        ({"test_accuracy": 0.98765}, "test accuracy 0.9877"),
        ({"images_per_second": 3.14159}, "3.14 images/s"),
        ({"images_per_second": 1234567.8}, "1,234,568 images/s"),
        ({}, ""),
    ],
)
def test_metrics_are_described_for_a_person(values: dict[str, float], line: str) -> None:
    assert describe(values) == line
