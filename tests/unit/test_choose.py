"""Which communicator is chosen, the reason that is given, and what cannot be made."""

import importlib.util
import re
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import pytest

from hpc_dl.comm import Choice, SerialCommunicator, choose, make
from hpc_dl.comm.choose import Horovod, gpu_is_there, installed_horovod
from hpc_dl.comm.launched import _MARKS
from hpc_dl.errors import LaunchError, MissingComponentError, OptionError

# The functions of these names hide their modules in hpc_dl.comm.
CHOOSE, MAKE = sys.modules["hpc_dl.comm.choose"], sys.modules["hpc_dl.comm.make"]

TORCH_ONLY = Horovod(frozenset({"torch"}), nccl=False)
WITH_NCCL = Horovod(frozenset({"torch", "tensorflow"}), nccl=True)

MPIRUN = {"OMPI_COMM_WORLD_RANK": "0", "OMPI_COMM_WORLD_SIZE": "2"}
HOROVODRUN = {"HOROVOD_RANK": "0", "HOROVOD_SIZE": "2"}
ONE_RANK = {"OMPI_COMM_WORLD_RANK": "0", "OMPI_COMM_WORLD_SIZE": "1"}


class Machine(NamedTuple):
    """How a process was started, and what is installed."""

    environment: dict[str, str]
    horovod: Horovod | None = None
    mpi4py: bool = True
    gpu: bool = False


Setup = Callable[[Machine], None]


@pytest.fixture
def setup(monkeypatch: pytest.MonkeyPatch) -> Setup:
    """Return a function that makes the code see a machine."""
    for mark, size, _ in _MARKS:
        monkeypatch.delenv(mark, raising=False)
        monkeypatch.delenv(size, raising=False)
    monkeypatch.delenv("HPC_DL_COMM", raising=False)
    really = importlib.util.find_spec

    def apply(machine: Machine) -> None:
        for name, value in machine.environment.items():
            monkeypatch.setenv(name, value)
        monkeypatch.setattr(CHOOSE, "installed_horovod", lambda: machine.horovod)
        monkeypatch.setattr(CHOOSE, "gpu_is_there", lambda framework: machine.gpu)
        hidden = set() if machine.mpi4py else {"mpi4py"}
        monkeypatch.setattr(
            importlib.util, "find_spec", lambda name: None if name in hidden else really(name)
        )

    return apply


@pytest.mark.parametrize(
    ("machine", "spec", "reason"),
    [
        (Machine({}, TORCH_ONLY), "serial", "without a launcher"),
        (Machine(MPIRUN, TORCH_ONLY), "mpi", "faster than Horovod on CPUs"),
        (Machine(MPIRUN), "mpi", "mpi4py is there"),
        (Machine(MPIRUN, TORCH_ONLY, mpi4py=False), "horovod", "mpi4py is not installed"),
        (Machine(MPIRUN, WITH_NCCL, gpu=True), "horovod", "GPUs are there.*NCCL"),
        (Machine(MPIRUN, TORCH_ONLY, gpu=True), "mpi", "mpirun"),
        (Machine(MPIRUN, WITH_NCCL), "mpi", "mpirun"),
        (Machine(HOROVODRUN, TORCH_ONLY), "horovod", "horovodrun"),
        (Machine(ONE_RANK, mpi4py=False), "serial", "one rank"),
        (Machine(MPIRUN | {"HPC_DL_COMM": "horovod"}), "horovod", "HPC_DL_COMM says so"),
        (Machine(MPIRUN | {"HPC_DL_COMM": "auto"}), "mpi", "mpirun"),
    ],
)
def test_choice_and_its_reason(setup: Setup, machine: Machine, spec: str, reason: str) -> None:
    setup(machine)
    choice = choose("torch")
    assert choice.spec == spec
    assert re.search(reason, choice.reason)


def test_horovod_for_another_framework_is_not_taken(setup: Setup) -> None:
    setup(Machine(MPIRUN, TORCH_ONLY, mpi4py=False))
    assert choose("torch").spec == "horovod"
    assert choose(None).spec == "horovod"
    with pytest.raises(MissingComponentError, match=r"for tensorflow.*hpc_dl\[mpi\].*horovod buil"):
        choose("tensorflow")


@pytest.mark.parametrize("environment", [MPIRUN, HOROVODRUN])
def test_ranks_that_nothing_connects(setup: Setup, environment: dict[str, str]) -> None:
    setup(Machine(environment, mpi4py=False))
    with pytest.raises(MissingComponentError, match=r"several ranks were started by .*pip install"):
        choose("torch")


def test_gpu_is_asked_of_frameworks_that_are_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "tensorflow", raising=False)
    fake = SimpleNamespace(cuda=SimpleNamespace(is_available=lambda: True))
    monkeypatch.setitem(sys.modules, "torch", fake)
    assert gpu_is_there("torch")
    assert gpu_is_there(None)
    assert not gpu_is_there("tensorflow")
    monkeypatch.delitem(sys.modules, "torch")
    assert not gpu_is_there("torch")


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({}, Horovod(frozenset(), False)),
        ({"torch/mpi_lib_v2.x.so": b"MPI_Allreduce"}, TORCH_ONLY),
        (
            {"torch/mpi_lib_v2.so": b"..ncclAllReduce..", "tensorflow/mpi_lib.so": b""},
            WITH_NCCL,
        ),
    ],
)
def test_installed_horovod_is_read_from_its_files(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, files: dict[str, bytes], expected: Horovod
) -> None:
    for name, content in {"horovod/__init__.py": b""}.items() | {
        (f"horovod/{name}", content) for name, content in files.items()
    }:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    monkeypatch.syspath_prepend(tmp_path)
    for name in [name for name in sys.modules if name.partition(".")[0] == "horovod"]:
        monkeypatch.delitem(sys.modules, name)
    assert installed_horovod() == expected


# --- make -----------------------------------------------------------------------------------


def test_makes_what_was_chosen(setup: Setup) -> None:
    setup(Machine({}))
    comm, choice = make()
    assert isinstance(comm, SerialCommunicator)
    assert choice == Choice("serial", "this process was started without a launcher")
    comm, choice = make("serial")
    assert (comm.size, choice.reason) == (1, "asked for")


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("nccl", "unknown communicator 'nccl'; valid: auto, horovod, mpi, serial"),
        ("mpi:nodes=2", "unknown option 'nodes' for communicator 'mpi'; .*: cuda, node_size"),
        ("serial:x=1", "valid options: none"),
        ("threads", "run_threads"),
        ("mpi:", "bad spec 'mpi:'"),
    ],
)
def test_what_cannot_be_made(spec: str, message: str) -> None:
    with pytest.raises(OptionError, match=message):
        make(spec)


def test_mpi_without_mpi4py(setup: Setup) -> None:
    setup(Machine({}, mpi4py=False))
    with pytest.raises(MissingComponentError, match=r"needs mpi4py.*pip install 'hpc_dl\[mpi\]'"):
        make("mpi")


@pytest.mark.parametrize(
    ("found", "framework", "message"),
    [
        (None, None, "not built here; build it with `hpc-dl horovod build`"),
        (Horovod(frozenset(), False), "torch", "not built here"),
        (TORCH_ONLY, "tensorflow", "built for torch, not for tensorflow; .* --framework tensorf"),
    ],
)
def test_horovod_that_is_not_built(
    monkeypatch: pytest.MonkeyPatch, found: Horovod | None, framework: str | None, message: str
) -> None:
    from hpc_dl.comm import horovod

    monkeypatch.setattr(horovod, "installed_horovod", lambda: found)
    with pytest.raises(MissingComponentError, match=message):
        make("horovod", framework)


def test_ranks_that_are_each_alone(setup: Setup, monkeypatch: pytest.MonkeyPatch) -> None:
    """The launcher of another MPI starts ranks that do not find each other."""
    setup(Machine(MPIRUN))
    alone = SimpleNamespace(name="mpi", size=1)
    monkeypatch.setitem(MAKE._MAKERS, "mpi", lambda framework: alone)
    with pytest.raises(LaunchError, match=r"mpirun started 2 ranks, but 'mpi' sees 1"):
        make("mpi")
    setup(Machine(ONE_RANK))
    assert make("mpi")[0] is alone
