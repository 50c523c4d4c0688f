"""The checkup names what is wrong, and what to do about it."""

from collections.abc import Mapping
from pathlib import Path

import pytest

from hpc_dl.cli import checkup
from hpc_dl.cli.checkup import Finding, findings
from hpc_dl.errors import MissingComponentError
from hpc_dl.launch import environment, horovod_status
from hpc_dl.launch.environment import Framework
from hpc_dl.launch.horovod_status import FrameworkState, Status
from hpc_dl.launch.mpirun import Mpirun

MPIRUN = Mpirun(Path("/opt/mpi/bin/mpirun"), "openmpi", "mpirun (Open MPI) 5.0.11", "PATH")
TORCH = Framework("torch", "2.13.0+cpu", None)
LIBRARY = "Open MPI v5.0.11"


@pytest.fixture(autouse=True)
def _healthy(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make a machine with torch, Open MPI and no GPU, on which nothing is started."""
    monkeypatch.setattr(environment, "find_torch", lambda: TORCH)
    monkeypatch.setattr(environment, "find_tensorflow", lambda: None)
    monkeypatch.setattr(environment, "module_version", lambda _: "1.0")
    monkeypatch.setattr(checkup, "find_mpirun", lambda: MPIRUN)
    monkeypatch.setattr(horovod_status, "status", lambda *_, **__: Status(None))
    monkeypatch.setattr(checkup, "check_allreduce", lambda *named: Finding(str(named), "sums"))
    answers(monkeypatch, {"mpi4py": LIBRARY})


def answers(monkeypatch: pytest.MonkeyPatch, said: Mapping[str, str]) -> None:
    """Let programs whose command holds a word say something, and all others nothing."""

    def output(command: list[str]) -> str:
        return next((text for word, text in said.items() if word in " ".join(command)), "")

    monkeypatch.setattr(checkup, "_output", output)


def broken() -> dict[str, Finding]:
    return {found.name: found for found in findings() if found.state == "broken"}


def named(name: str) -> list[Finding]:
    return [found for found in findings() if found.name == name]


def test_a_healthy_machine_has_nothing_to_repair() -> None:
    assert broken() == {}
    (horovod,) = named("Horovod")
    assert (horovod.state, horovod.value) == ("absent", "not installed")
    assert named("('auto', 'torch')") != []


def test_no_framework(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(environment, "find_torch", lambda: None)
    assert "hpc_dl[torch]" in broken()["frameworks"].remedy
    assert named("('auto', None)") != []


def test_no_mpirun(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail() -> Mpirun:
        raise MissingComponentError("no mpirun was found; install one")

    monkeypatch.setattr(checkup, "find_mpirun", fail)
    found = broken()
    assert "install one" in found["mpirun"].remedy
    assert not any("auto" in finding.name for finding in findings())


def test_mpi4py_without_its_library(monkeypatch: pytest.MonkeyPatch) -> None:
    answers(monkeypatch, {})
    assert "loads no MPI library" in broken()["mpi4py"].value


def test_an_mpirun_of_another_mpi(monkeypatch: pytest.MonkeyPatch) -> None:
    answers(monkeypatch, {"mpi4py": "MPICH Version: 4.2"})
    assert "HPC_DL_MPIRUN" in broken()["mpirun and mpi4py"].remedy


@pytest.mark.parametrize(("counted", "well"), [("0", False), ("", False), ("2", True)])
def test_gpus_that_torch_does_not_see(
    monkeypatch: pytest.MonkeyPatch, counted: str, well: bool
) -> None:
    monkeypatch.setattr(environment, "find_torch", lambda: Framework("torch", "2.13.0", "12.8"))
    listed = "A100, 40 GB, 550\nA100, 40 GB, 550\n"
    said = {"nvidia-smi": listed, "device_count": counted, "mpi4py": LIBRARY}
    answers(monkeypatch, said)
    assert ("GPUs in PyTorch" not in broken()) is well
    assert named("GPU 1")[0].value == "A100, 40 GB, 550"


def test_gpus_and_only_cpu_builds(monkeypatch: pytest.MonkeyPatch) -> None:
    answers(monkeypatch, {"nvidia-smi": "A100, 40 GB, 550\n", "mpi4py": LIBRARY})
    (found,) = named("GPUs in frameworks")
    assert found.state == "absent"
    assert "CUDA build" in found.remedy


@pytest.mark.parametrize("built", ["2.13.0+cpu", "2.1.0"])
def test_horovod_is_checked_only_where_it_fits(monkeypatch: pytest.MonkeyPatch, built: str) -> None:
    problem = "" if built == TORCH.version else "Horovod was compiled for torch 2.1.0"
    frameworks = {"torch": FrameworkState(TORCH.version, built, problem=problem)}
    state = Status("0.28.1", frameworks)
    monkeypatch.setattr(horovod_status, "status", lambda *_, **__: state)
    found = broken()
    assert [finding.value for finding in found.values()] == ([problem] if problem else [])
    assert (named("('horovod', 'torch')") == []) is bool(problem)


@pytest.mark.parametrize(("free", "well"), [(2**30, True), (2**20, False)])
def test_little_shared_memory(monkeypatch: pytest.MonkeyPatch, free: int, well: bool) -> None:
    class Usage:
        def __init__(self) -> None:
            self.free = free

    monkeypatch.setattr("shutil.disk_usage", lambda _: Usage())
    assert ("shared memory" not in broken()) is well
