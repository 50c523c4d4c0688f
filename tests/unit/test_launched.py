"""What launchers leave in the environment."""

import pytest

from hpc_dl.comm.abort import rank_label
from hpc_dl.comm.launched import _MARKS, Launcher, find_launcher


@pytest.fixture(autouse=True)
def _by_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    for mark, size, _ in _MARKS:
        monkeypatch.delenv(mark, raising=False)
        monkeypatch.delenv(size, raising=False)
    for name in ("PMIX_RANK", "PMI_RANK", "SLURM_PROCID", "OMPI_COMM_WORLD_RANK"):
        monkeypatch.delenv(name, raising=False)


def test_started_by_hand() -> None:
    assert find_launcher() is None
    assert rank_label() == "rank 0"


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        (
            {"OMPI_COMM_WORLD_RANK": "1", "OMPI_COMM_WORLD_SIZE": "4"},
            Launcher("Open MPI's mpirun", 4),
        ),
        ({"HOROVOD_RANK": "0", "HOROVOD_SIZE": "2"}, Launcher("horovodrun", 2)),
        ({"PMI_RANK": "0", "PMI_SIZE": "8"}, Launcher("mpiexec (PMI)", 8)),
        ({"PMIX_RANK": "0", "SLURM_STEP_NUM_TASKS": "16"}, Launcher("a PMIx launcher", 16)),
        ({"PMIX_RANK": "0"}, Launcher("a PMIx launcher", None)),
        ({"SLURM_STEP_NUM_TASKS": "3"}, Launcher("srun", 3)),
        ({"HPC_DL_EXPECTED_SIZE": "2"}, Launcher("hpc-dl launch", 2)),
        ({"SLURM_STEP_NUM_TASKS": "many"}, Launcher("srun", None)),
    ],
    ids=lambda p: p.name if isinstance(p, Launcher) else "",
)
def test_launchers(
    monkeypatch: pytest.MonkeyPatch, environment: dict[str, str], expected: Launcher
) -> None:
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert find_launcher() == expected


def test_own_launcher_counts_before_the_mpirun_it_uses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMPI_COMM_WORLD_RANK", "0")
    monkeypatch.setenv("OMPI_COMM_WORLD_SIZE", "1")
    monkeypatch.setenv("HPC_DL_EXPECTED_SIZE", "2")
    assert find_launcher() == Launcher("hpc-dl launch", 2)


def test_rank_label(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURM_PROCID", "3")
    assert rank_label() == "rank 3"
