"""The Makefile works in a folder with a space, and does a second time only what is to be done."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

pytestmark = pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Make a folder with what the recipes need, and programs that only note their arguments."""
    copy = tmp_path / "a copy of it"
    copy.mkdir()
    for name in ("Makefile", "setup.cfg", "pyproject.toml"):
        shutil.copy(ROOT / name, copy)
    for name in ("pip", "hpc-dl", "python"):
        (copy / f"{name}.sh").write_text(
            f'#!/bin/sh\necho "{name} $*" >>log\nexit "${{CODE_OF_{name.upper()[:3]}:-0}}"\n'
        )
    return copy


def make(folder: Path, *arguments: str, **variables: str) -> "subprocess.CompletedProcess[str]":
    # A make that runs this test says in MAKEFLAGS what it was called with.
    environ = {name: value for name, value in os.environ.items() if not name.startswith("MAKE")}
    replaced = ["PIP=sh pip.sh", "HPC_DL=sh hpc-dl.sh", f"PYTHON3={sys.executable}"]
    return subprocess.run(
        ["make", *replaced, *arguments],
        cwd=folder,
        env=environ | variables,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )


def log(folder: Path) -> list[str]:
    """Return what was noted, each program by its first word, and forget it."""
    path = folder / "log"
    lines = path.read_text().splitlines() if path.exists() else []
    path.unlink(missing_ok=True)
    return [line.split()[0] for line in lines]


def test_the_demo_installs_once(folder: Path) -> None:
    done = make(folder, "demo")
    assert done.returncode == 0, done.stderr
    assert (folder / ".venv" / "bin" / "python").exists()
    assert "launch -n 2 jobs/digits.py" in (folder / "log").read_text()
    assert log(folder) == ["pip", "hpc-dl"]
    assert make(folder, "demo").returncode == 0
    assert log(folder) == ["hpc-dl"]
    later = (folder / "setup.cfg").stat().st_mtime + 1000
    os.utime(folder / "setup.cfg", (later, later))
    assert make(folder, "demo").returncode == 0
    assert log(folder) == ["pip", "hpc-dl"]


def prepared(folder: Path) -> Path:
    """Spare the time for a real environment."""
    (folder / ".venv").mkdir()
    (folder / ".venv" / "stamp-python").touch()
    return folder


def test_an_installation_that_failed_is_tried_again(folder: Path) -> None:
    prepared(folder)
    assert make(folder, "demo", CODE_OF_PIP="1").returncode != 0
    assert log(folder) == ["pip"]
    assert make(folder, "demo").returncode == 0
    assert log(folder) == ["pip", "hpc-dl"]


def test_after_the_tests_the_demo_has_all_it_needs(folder: Path) -> None:
    prepared(folder)
    assert make(folder, "horovod").returncode == 0
    assert log(folder) == ["pip", "hpc-dl"]
    assert make(folder, "demo").returncode == 0
    assert log(folder) == ["hpc-dl"]


def test_test_is_the_sum_of_its_parts(folder: Path) -> None:
    prepared(folder)
    assert make(folder, "venv").returncode == 0
    commands = [make(folder, "-n", part).stdout for part in ("lint", "test-unit", "test-parallel")]
    whole = make(folder, "-n", "test").stdout.splitlines()
    assert all(set(part.splitlines()) <= set(whole) for part in commands)
    assert any("mypy" in line for line in whole)
    assert any("run_parallel.py" in line for line in whole)


@pytest.mark.parametrize("target", ["test-unit", "test-parallel"])
def test_runs_that_select_nothing_pass_only_if_tests_were_chosen(folder: Path, target: str) -> None:
    prepared(folder)
    fake = "PYTHON=sh python.sh"
    nothing = {"CODE_OF_PYT": "5"}
    assert make(folder, target, fake).returncode == 0
    assert make(folder, target, fake, **nothing).returncode != 0
    log(folder)
    assert make(folder, target, fake, "PYTEST_ARGS=-k 'adam or sgd'", **nothing).returncode == 0
    assert log(folder).count("python") == (1 if target == "test-unit" else 2)
    failing = make(folder, target, fake, "PYTEST_ARGS=-k adam", CODE_OF_PYT="1")
    assert failing.returncode != 0


def test_every_target_is_explained(folder: Path) -> None:
    text = (folder / "Makefile").read_text().replace("\\\n", " ")
    phony = next(line for line in text.splitlines() if line.startswith(".PHONY:"))
    shown = make(folder, "help").stdout
    for target in set(phony.split()[1:]) - {"help", "venv"}:
        assert target in shown, f"`make help` says nothing of {target}"
