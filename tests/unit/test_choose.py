"""Which communicator is chosen, the reason that is given, and what cannot be made."""

import importlib.util
from typing import NamedTuple

import pytest

from hpc_dl.comm import Choice, choose, make
from hpc_dl.comm import choose as _choose_function  # noqa: F401
from hpc_dl.comm.choose import Horovod
from hpc_dl.comm.launched import _MARKS
from hpc_dl.errors import LaunchError, MissingComponentError, OptionError

CHOOSE = importlib.import_module("hpc_dl.comm.choose")
MAKE = importlib.import_module("hpc_dl.comm.make")

TORCH_ONLY = Horovod(frozenset({"torch"}), nccl=False)
WITH_NCCL = Horovod(frozenset({"torch", "tensorflow"}), nccl=True)

MPIRUN = {"OMPI_COMM_WORLD_RANK": "0", "OMPI_COMM_WORLD_SIZE": "2"}
HOROVODRUN = {"HOROVOD_RANK": "0", "HOROVOD_SIZE": "2"}
ONE_RANK = {"OMPI_COMM_WORLD_RANK": "0", "OMPI_COMM_WORLD_SIZE": "1"}


class Machine(NamedTuple):
    """What is installed, how the process was started, and the choice that follows."""

    environment: dict[str, str]
    horovod: Horovod | None
    mpi4py: bool
    gpu: bool
    expected: str
    reason: str


CASES = {
    "by hand": Machine({}, TORCH_ONLY, True, False, "serial", "without a launcher"),
    "mpirun, both": Machine(MPIRUN, TORCH_ONLY, True, False, "mpi", "faster than Horovod on CPUs"),
    "mpirun, mpi4py": Machine(MPIRUN, None, True, False, "mpi", "mpi4py is there"),
    "mpirun, horovod": Machine(MPIRUN, TORCH_ONLY, False, False, "horovod", "mpi4py is not"),
    "gpu with nccl": Machine(MPIRUN, WITH_NCCL, True, True, "horovod", "GPUs .* NCCL"),
    "gpu without nccl": Machine(MPIRUN, TORCH_ONLY, True, True, "mpi", "mpirun"),
    "nccl without gpu": Machine(MPIRUN, WITH_NCCL, True, False, "mpi", "mpirun"),
    "horovodrun": Machine(HOROVODRUN, TORCH_ONLY, True, False, "horovod", "horovodrun"),
    "one rank, nothing": Machine(ONE_RANK, None, False, False, "serial", "one rank"),
}


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> Machine:
    machine: Machine = request.param
    for mark, size, _ in _MARKS:
        monkeypatch.delenv(mark, raising=False)
        monkeypatch.delenv(size, raising=False)
    monkeypatch.delenv("HPC_DL_COMM", raising=False)
    for name, value in machine.environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(CHOOSE, "installed_horovod", lambda: machine.horovod)
    monkeypatch.setattr(CHOOSE, "gpu_is_there", lambda framework: machine.gpu)
    found = importlib.util.find_spec

    def find_spec(name: str) -> object:
        return None if name == "mpi4py" and not machine.mpi4py else found(name)

    monkeypatch.setattr(importlib.util, "find_spec", find_spec)
    return machine


@pytest.mark.parametrize("machine", CASES.values(), ids=CASES.keys(), indirect=True)
def test_choice(machine: Machine) -> None:
    choice = choose("torch")
    assert choice.spec == machine.expected
    assert pytest.approx(0) == 0  # noqa: PLR0133
    with pytest.raises(AssertionError, match=machine.reason):
        raise AssertionError(choice.reason)
