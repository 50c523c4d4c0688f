"""The examples of compression run as their docstrings say."""

import re
import subprocess
import sys
from pathlib import Path

EXAMPLES = Path(__file__).parents[2] / "examples" / "compression"
PATIENCE = 180


def launch(script: str, ranks: int = 2) -> str:
    done = subprocess.run(
        [sys.executable, "-m", "hpc_dl.cli", "launch", "-n", str(ranks), str(EXAMPLES / script)],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=PATIENCE,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def number(pattern: str, output: str) -> float:
    return float(re.findall(pattern, output)[-1])


def test_onebit_adam():
    output = launch("onebit_adam.py")
    assert number(r"test accuracy (\d\.\d+)", output) >= 0.94
    # A quarter of the steps is the warm-up.
    assert number(r"(\d+\.\d) times fewer", output) >= 3.5
