"""The examples of compression run as their docstrings say."""

import re
import subprocess
import sys
from pathlib import Path

EXAMPLES = Path(__file__).parents[2] / "examples" / "compression"
PATIENCE = 180


def launch(script: str, *arguments: str) -> str:
    start = [sys.executable, "-m", "hpc_dl.cli", "launch", "-n", "2"]
    done = subprocess.run(
        [*start, str(EXAMPLES / script), *arguments],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=PATIENCE,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


def number(pattern: str, output: str) -> float:
    return float(re.findall(pattern, output)[-1])


def test_onebit_adam():
    output = launch("onebit_adam.py")
    assert number(r"test accuracy (\d\.\d+)", output) >= 0.94
    # A quarter of the steps is the warm-up.
    assert number(r"(\d+\.\d) times fewer", output) >= 3.5


def test_rules() -> None:
    output = launch("rules.py")
    assert number(r"test accuracy (\d\.\d+)", output) >= 0.93
    assert number(r"(\d+\.\d) times fewer", output) >= 7


def test_auto_says_what_it_measured() -> None:
    output = launch("rules.py", "auto")
    assert number(r"test accuracy (\d\.\d+)", output) >= 0.93
    assert len(re.findall(r"compression=auto: a step takes", output)) == 1
    assert len(re.findall(r"\w <- ", output)) == 1
    assert number(r"sent (\d+\.\d+) MB", output) > 0
