"""The examples of Keras and TensorFlow run as their docstrings say."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from hpc_dl.comm.choose import installed_horovod

ROOT = Path(__file__).parents[2]
EXAMPLES = ROOT / "examples"
PATIENCE = 240


def launch(
    script: Path, *arguments: str, ranks: int = 2, environment: dict[str, str] | None = None
) -> str:
    """Run a script on some ranks and return what it printed."""
    done = subprocess.run(
        [sys.executable, "-m", "hpc_dl.cli", "launch", "-n", str(ranks), str(script), *arguments],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=PATIENCE,
        env={**os.environ, "TF_CPP_MIN_LOG_LEVEL": "3", **(environment or {})},
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def accuracy(output: str) -> float:
    return float(re.findall(r"test accuracy (\d\.\d+)", output)[-1])


def has_horovod() -> bool:
    horovod = installed_horovod()
    return horovod is not None and "tensorflow" in horovod.frameworks


@pytest.mark.parametrize("backend", ["tensorflow", "torch"])
def test_keras_mnist(backend, tmp_path):
    output = launch(
        EXAMPLES / "keras" / "mnist.py",
        *("--epochs", "6", "--checkpoint-dir", str(tmp_path)),
        environment={"KERAS_BACKEND": backend},
    )
    assert accuracy(output) >= 0.93
    assert len(list(tmp_path.glob("checkpoint-*.keras"))) == 6


def test_tensorflow_mnist_on_three_ranks(tmp_path):
    output = launch(
        EXAMPLES / "tensorflow" / "mnist.py", "--checkpoint-dir", str(tmp_path), ranks=3
    )
    assert accuracy(output) >= 0.93
    assert list(tmp_path.glob("checkpoint-1.index"))


@pytest.mark.parametrize(
    ("folder", "ours"), [("keras", "hpc_dl.keras"), ("tensorflow", "hpc_dl.tensorflow")]
)
def test_the_import_is_all_that_names_hpc_dl(folder, ours):
    text = (EXAMPLES / folder / "mnist.py").read_text()
    assert text.count("hpc_dl") == text.count(f"import {ours} as hvd") == 1


def test_uneven_batches():
    output = launch(EXAMPLES / "tensorflow" / "uneven_batches.py", ranks=3)
    assert output.count("rank 2 was the last") == 3
    assert len(set(re.findall(r"slope (\S+)", output))) == 1


def test_uneven_batches_is_a_horovod_script_but_for_the_import(tmp_path):
    if not has_horovod():
        pytest.skip("Horovod is not built for TensorFlow here (`make horovod`)")
    text = (EXAMPLES / "tensorflow" / "uneven_batches.py").read_text()
    script = tmp_path / "uneven_batches.py"
    script.write_text(text.replace("import hpc_dl.tensorflow as", "import horovod.tensorflow as"))
    assert launch(script).count("rank 1 was the last") == 2


def test_horovods_own_keras_optimizer_does_not_reduce_and_ours_does():
    output = launch(ROOT / "benchmarks" / "keras_divergence.py")
    assert re.search(r"hpc_dl\.keras +replicas are equal", output)
    if has_horovod():
        assert re.search(r"horovod\.tensorflow\.keras +replicas DIFFER", output)
