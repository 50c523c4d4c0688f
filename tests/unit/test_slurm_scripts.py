"""The job scripts for Slurm are good bash, and end all ranks when one fails."""

import re
import subprocess
from pathlib import Path

import pytest

SCRIPTS = sorted((Path(__file__).parents[2] / "slurm").glob("*.sbatch"))


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_a_script_is_good_bash(script: Path) -> None:
    done = subprocess.run(
        ["bash", "-n", script], capture_output=True, text=True, timeout=60, check=False
    )
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_a_rank_that_fails_ends_the_step(script: Path) -> None:
    text = script.read_text().replace("\\\n", " ")
    starts = re.findall(r"^\s*srun\b.*", text, re.MULTILINE)
    assert starts
    assert all("--kill-on-bad-exit=1" in line.split() for line in starts)
