"""The torch examples run as their docstrings say, and under Horovod after the import change."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from hpc_dl.comm.choose import installed_horovod

EXAMPLES = Path(__file__).parents[2] / "examples" / "torch"
PATIENCE = 180


def launch(script: Path, *arguments: str, ranks: int = 2) -> str:
    """Run a script on some ranks and return what it printed."""
    done = subprocess.run(
        [sys.executable, "-m", "hpc_dl.cli", "launch", "-n", str(ranks), str(script), *arguments],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=PATIENCE,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def last_accuracy(output: str) -> float:
    return float(re.findall(r"accuracy (\d\.\d+)", output)[-1])


def test_mnist():
    assert last_accuracy(launch(EXAMPLES / "mnist.py", "--epochs", "8")) >= 0.93


def test_mnist_over_three_ranks_with_options():
    output = launch(
        EXAMPLES / "mnist.py",
        *("--epochs", "8", "--fp16-allreduce", "--gradient-predivide-factor", "2"),
        ranks=3,
    )
    assert last_accuracy(output) >= 0.93


def test_imagenet_resumes_from_its_checkpoint(tmp_path):
    arguments = ("--checkpoint-dir", str(tmp_path))
    first = launch(EXAMPLES / "imagenet.py", "--epochs", "2", *arguments)
    assert "epoch 2" in first
    second = launch(EXAMPLES / "imagenet.py", "--epochs", "3", *arguments)
    assert "epoch 2" not in second
    assert last_accuracy(second) >= 0.93


def test_uneven_batches():
    output = launch(EXAMPLES / "uneven_batches.py", ranks=3)
    assert output.count("rank 2 was the last") == 3


@pytest.mark.parametrize("name", ["mnist.py", "imagenet.py"])
def test_the_import_is_all_that_differs_from_a_horovod_script(name, tmp_path):
    horovod = installed_horovod()
    if horovod is None or "torch" not in horovod.frameworks:
        pytest.skip("Horovod is not built for torch here (`make horovod`)")
    text = (EXAMPLES / name).read_text()
    assert text.count("hpc_dl.torch") == 1
    script = tmp_path / name
    script.write_text(text.replace("import hpc_dl.torch as hvd", "import horovod.torch as hvd"))
    options = ("--checkpoint-dir", str(tmp_path)) if name == "imagenet.py" else ()
    assert last_accuracy(launch(script, "--epochs", "3", *options)) >= 0.7
