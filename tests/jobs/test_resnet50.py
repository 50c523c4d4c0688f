"""The ResNet-50 job trains on noise and on folders of images."""

from pathlib import Path

import numpy as np
import pytest
from job_runs import FRAMEWORKS, RunJob
from PIL import Image

from hpc_dl.observe import read_metrics

pytestmark = pytest.mark.timeout(900)


@pytest.mark.parametrize("framework", FRAMEWORKS)
def test_noise_goes_through(framework: str, run_job: RunJob) -> None:
    run = run_job(
        "resnet50", "--framework", framework, "--image-size", 32, "--batch-size", 2, "--steps", 2,
        "--epochs", 2, "--label-smoothing", 0.1, "--lr", 0.001,
    )  # fmt: skip
    summary = run.summary
    assert (summary["job"], summary["world_size"]) == ("resnet50", 2)
    assert (summary["data"], summary["image_size"]) == ("synthetic", 32)
    assert summary["test_accuracy"] is None
    assert summary["images_per_second"] > 0
    # 4 steps of some 25.57 M gradients, of which each of 2 ranks sends as many.
    assert summary["bytes_sent"] == pytest.approx(4 * 25.57e6 * 4, rel=0.001)
    first, last = read_metrics(run.folder / "metrics.jsonl")
    assert first["loss"] < 10
    assert last["loss"] < 10
    assert last["lr"] < first["lr"]
    assert (run.folder / "curve.png").is_file()


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    """Make a folder with two classes: ten pictures to learn from, three to be tested on."""
    generator = np.random.default_rng(0)
    for part, count in (("train", 5), ("val", 2)):
        for name in ("cat", "dog"):
            folder = tmp_path / "images of mine" / part / name
            folder.mkdir(parents=True)
            for i in range(count - (name == "dog" and part == "val")):
                pixels = generator.integers(0, 256, (40, 50, 3), np.uint8)
                Image.fromarray(pixels).save(folder / f"{i}.jpg")
    return tmp_path / "images of mine"


@pytest.mark.parametrize("framework", FRAMEWORKS)
def test_a_folder_of_images_is_learned_and_tested(
    framework: str, pictures: Path, run_job: RunJob
) -> None:
    run = run_job(
        "resnet50", "--framework", framework, "--data", pictures, "--image-size", 32,
        "--batch-size", 3, "--epochs", 2, "--sync-batch-norm",
    )  # fmt: skip
    right = run.summary["test_accuracy"] * 3
    assert right == pytest.approx(round(right))
    records = read_metrics(run.folder / "metrics.jsonl")
    assert [record["epoch"] for record in records] == [1, 2]


def test_folders_of_different_classes_are_refused(pictures: Path, run_job: RunJob) -> None:
    (pictures / "val" / "dog").rename(pictures / "val" / "wolf")
    run = run_job("resnet50", "--data", pictures, "--image-size", 32, ranks=0)
    assert run.code == 2
    assert "both need the same folders" in run.err


def test_a_missing_folder_is_refused(tmp_path: Path, run_job: RunJob) -> None:
    run = run_job("resnet50", "--data", tmp_path / "nothing", ranks=0)
    assert run.code == 2
    assert "cannot be read" in run.err
    assert "Traceback" not in run.err
