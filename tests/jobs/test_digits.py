"""The digits job learns, says so, and does the same thing twice."""

import re
from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest
from job_runs import FRAMEWORKS, PATIENCE, Finished, RunJob
from PIL import Image

from hpc_dl.comm.choose import installed_horovod
from hpc_dl.observe import read_metrics

pytestmark = pytest.mark.timeout(600)

#: Enough to learn the digits.
EPOCHS = 5


@pytest.fixture(scope="session")
def trained(run_job: RunJob) -> Callable[[str], Finished]:
    """Train on two ranks, once for each framework."""

    @cache
    def trained(framework: str) -> Finished:
        return run_job("digits", "--framework", framework, "--epochs", EPOCHS)

    return trained


@pytest.mark.parametrize("framework", FRAMEWORKS)
def test_two_ranks_learn_the_digits(framework: str, trained: Callable[[str], Finished]) -> None:
    summary = trained(framework).summary
    assert summary["test_accuracy"] >= 0.97
    assert summary["world_size"] == 2
    assert (summary["comm"], summary["framework"]) == ("mpi", framework)
    assert summary["versions"][framework]


@pytest.mark.parametrize("framework", FRAMEWORKS)
def test_the_files_tell_the_same_story(framework: str, trained: Callable[[str], Finished]) -> None:
    run = trained(framework)
    summary = run.summary
    assert sorted(path.name for path in run.folder.iterdir()) == [
        "curve.png",
        "metrics.jsonl",
        "summary.json",
    ]
    records = read_metrics(run.folder / "metrics.jsonl")
    assert [record["epoch"] for record in records] == list(range(1, EPOCHS + 1))
    assert records[-1]["test_accuracy"] == summary["test_accuracy"]
    assert records[-1]["loss"] < 0.1 < records[0]["loss"]
    # 360 test images: an accuracy is a number of them, none lost or counted twice.
    right = summary["test_accuracy"] * 360
    assert right == pytest.approx(round(right), abs=1e-6)
    assert 0 < summary["seconds"] < PATIENCE
    assert summary["images_per_second"] > 0
    with Image.open(run.folder / "curve.png") as picture:
        assert picture.size == (1500, 630)


@pytest.mark.parametrize("framework", FRAMEWORKS)
def test_each_step_sends_the_gradients_once(
    framework: str, trained: Callable[[str], Finished]
) -> None:
    """With 2 ranks each sends 2 (2 - 1) / 2 = 1 times the gradients, 4 bytes each."""
    steps = EPOCHS * -(-(1437 // 2) // 32)
    assert trained(framework).summary["bytes_sent"] == pytest.approx(steps * 151_306 * 4, rel=0.001)


@pytest.mark.parametrize("framework", FRAMEWORKS)
def test_the_same_seed_gives_the_same_weights(
    framework: str, trained: Callable[[str], Finished], run_job: RunJob
) -> None:
    again = run_job("digits", "--framework", framework, "--epochs", EPOCHS)
    assert again.summary["weights_digest"] == trained(framework).summary["weights_digest"]


@pytest.mark.skipif(
    "torch" not in getattr(installed_horovod(), "frameworks", ()),
    reason="Horovod is not built for torch; run `hpc-dl horovod build`",
)
def test_horovod_gives_the_weights_that_mpi_gives(
    trained: Callable[[str], Finished], run_job: RunJob
) -> None:
    """With two ranks there is one order of summation only."""
    over = run_job("digits", "--comm", "horovod", "--epochs", EPOCHS).summary
    assert over["comm"] == "horovod"
    assert over["weights_digest"] == trained("torch").summary["weights_digest"]


def test_rank_0_alone_speaks(trained: Callable[[str], Finished]) -> None:
    lines = trained("torch").out.splitlines()
    assert all(line.startswith("[0]") for line in lines)
    assert len([line for line in lines if re.search(r"epoch +\d+/5 ", line)]) == EPOCHS
    assert any("test accuracy" in line and "│" in line for line in lines)


def test_plain_python_is_one_rank(run_job: RunJob) -> None:
    summary = run_job("digits", "--epochs", 1, "--seed", 2, ranks=0).summary
    assert (summary["world_size"], summary["comm"], summary["bytes_sent"]) == (1, "serial", 0)
    assert summary["seed"] == 2


@pytest.mark.parametrize("ranks", [0, 2])
def test_a_run_folder_that_cannot_be_written_ends_the_job_before_training(
    ranks: int, run_job: RunJob, tmp_path: Path
) -> None:
    in_the_way = tmp_path / "file"
    in_the_way.touch()
    run = run_job("digits", ranks=ranks, folder=in_the_way / "results")
    assert run.code == 2
    said = run.out + run.err
    assert said.count("cannot make the run folder") == 1
    assert "epoch" not in said
    assert "Traceback" not in said


def test_an_unknown_communicator_lists_the_known_ones(run_job: RunJob) -> None:
    run = run_job("digits", "--comm", "nccl")
    assert run.code == 2
    assert "unknown communicator 'nccl'; valid: auto, horovod, mpi, serial" in run.out + run.err
    assert "Traceback" not in run.out + run.err


# --- compression --------------------------------------------------------------------


@pytest.mark.parametrize("framework", FRAMEWORKS)
def test_compressed_gradients_learn_and_are_a_fifth_of_the_bytes(
    framework: str, run_job: RunJob
) -> None:
    options = ("--framework", framework, "--epochs", EPOCHS)
    summary = run_job("digits", *options, "--compression", "powersgd:rank=4").summary
    assert summary["bytes_dense"] > 5 * summary["bytes_sent"] > 0
    assert summary["test_accuracy"] >= 0.95
    assert summary["compression"] == "powersgd:rank=4"


@pytest.mark.parametrize("framework", FRAMEWORKS)
def test_without_compression_all_bytes_are_dense(
    framework: str, trained: Callable[[str], Finished]
) -> None:
    summary = trained(framework).summary
    assert summary["bytes_sent"] == pytest.approx(summary["bytes_dense"], rel=0.001)


@pytest.mark.parametrize("ranks", [0, 2])
def test_an_unknown_compression_lists_the_known_ones(ranks: int, run_job: RunJob) -> None:
    run = run_job("digits", "--compression", "tpok:ratio=0.1", ranks=ranks)
    said = run.out + run.err
    assert run.code == 2
    assert said.count("unknown compression 'tpok'; valid: auto, bf16, ") == 1
    assert "Traceback" not in said
    assert "epoch" not in said


@pytest.mark.parametrize("framework", FRAMEWORKS)
def test_momentum_is_taken_once(framework: str, run_job: RunJob) -> None:
    """DGC takes it before it sends; an optimizer that took it again would be refused."""
    options = ("--framework", framework, "--epochs", EPOCHS)
    summary = run_job("digits", *options, "--compression", "dgc:ratio=0.01").summary
    assert summary["test_accuracy"] >= 0.9
    assert summary["bytes_dense"] > 5 * summary["bytes_sent"] > 0
