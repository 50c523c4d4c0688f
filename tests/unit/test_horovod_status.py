"""What is said of the installed Horovod: what it was built with, and whether that still fits."""

import json
import zipfile
from dataclasses import replace
from pathlib import Path

import pytest
from click.testing import CliRunner

from hpc_dl.cli import main
from hpc_dl.errors import MissingComponentError
from hpc_dl.launch import environment, horovod_install, horovod_status, toolchain, wheel_cache
from hpc_dl.launch.environment import Framework
from hpc_dl.launch.horovod_install import Probe
from hpc_dl.launch.horovod_plan import BuildRequest, plan
from hpc_dl.launch.toolchain import Mpi, Toolchain
from hpc_dl.launch.wheel_cache import CachedWheel, Key

MPI = Mpi(Path("/opt/mpi/bin/mpicxx"), "mpirun (Open MPI) 5.0.11", "/opt/mpi")
WORKS = Probe(built={"mpi": True, "nccl": False})


@pytest.fixture(autouse=True)
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Make an environment with a torch, an MPI, and the files of a Horovod."""
    folder = tmp_path / "site" / "horovod"
    folder.mkdir(parents=True)
    (folder / "mpi_lib.so").write_bytes(b"compiled")
    (folder / "metadata.json").write_text(json.dumps({"pytorch": "2.13.0"}))
    torch = Framework("torch", "2.13.0", None)
    monkeypatch.setattr(environment, "find_torch", lambda: torch)
    monkeypatch.setattr(environment, "find_tensorflow", lambda: None)
    monkeypatch.setattr(environment, "module_folder", lambda _: folder)
    monkeypatch.setattr(environment, "module_version", lambda _: "0.28.1")
    monkeypatch.setattr(toolchain, "inspect", lambda *_: Toolchain(MPI, None, None, None, ()))
    monkeypatch.setattr(horovod_install, "probe", lambda _: WORKS)
    return folder


def store(folder: Path, key: Key, library: bytes = b"compiled") -> CachedWheel:
    folder.mkdir(parents=True, exist_ok=True)
    built = folder / "horovod.whl"
    with zipfile.ZipFile(built, "w") as content:
        content.writestr("horovod/mpi_lib.so", library)
        content.writestr("horovod/metadata.json", json.dumps({"pytorch": "2.13.0"}))
    return wheel_cache.store(folder, key, built, 300.0)


@pytest.fixture
def key(tmp_path: Path) -> Key:
    return plan(BuildRequest(tmp_path), {}).key


def test_the_wheel_that_is_installed_is_found(tmp_path: Path, key: Key) -> None:
    other = store(tmp_path / "wheels", replace(key, mpi="MPICH 4"), b"compiled otherwise")
    own = store(tmp_path / "wheels", key)
    state = horovod_status.status(tmp_path / "wheels", {})
    assert state.origin == own
    assert state.differences == ()
    assert {wheel.key for wheel in state.wheels} == {own.key, other.key}
    assert state.problems == []


def test_what_changed_since_the_build_is_named(tmp_path: Path, key: Key) -> None:
    store(tmp_path / "wheels", replace(key, mpi="MPICH 4", patches="old"))
    state = horovod_status.status(tmp_path / "wheels", {"CXX": "g++-12"})
    told = "\n".join(state.differences)
    assert "MPICH 4" in told
    assert key.mpi in told
    assert "patches" in told
    assert "CXX=g++-12" in told
    assert len(state.differences) == 3


def test_a_horovod_from_elsewhere_is_told_apart(tmp_path: Path, key: Key) -> None:
    store(tmp_path / "wheels", key, b"compiled otherwise")
    state = horovod_status.status(tmp_path / "wheels", {})
    assert state.origin is None
    done = CliRunner().invoke(main, ["horovod", "status", "--wheel-dir", str(tmp_path / "wheels")])
    assert "no wheel here is the installed one" in " ".join(done.stdout.split())


def test_a_machine_without_tools_still_has_a_status(
    tmp_path: Path, key: Key, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = store(tmp_path / "wheels", key)
    bare = Toolchain(None, None, None, None, ("no MPI: install one",))
    monkeypatch.setattr(toolchain, "inspect", lambda *_: bare)
    with pytest.raises(MissingComponentError):
        plan(BuildRequest(tmp_path), {})
    state = horovod_status.status(tmp_path / "wheels", {})
    assert state.origin == own
    assert len(state.differences) == 1
    assert "no MPI: install one" in state.differences[0]


def test_the_status_shows_what_the_installed_one_was_built_with(tmp_path: Path, key: Key) -> None:
    store(tmp_path / "wheels", replace(key, mpi="MPICH [4]", settings="CXX=[g++]"))
    arguments = ["horovod", "status", "--wheel-dir", str(tmp_path / "wheels")]
    done = CliRunner().invoke(main, arguments)
    assert done.exit_code == 0, done.output
    shown = " ".join(done.stdout.split())
    assert "MPICH [4]" in shown
    assert "CXX=[g++]" in shown
    assert key.patches in shown
    report = json.loads(CliRunner().invoke(main, [*arguments, "--json"]).stdout)
    assert report["installed_wheel"]["mpi"] == "MPICH [4]"
    assert len(report["differences"]) == 2


@pytest.mark.parametrize(
    ("installed", "built", "works", "problem"),
    [
        ("2.13.0", "2.13.0", True, ""),
        ("2.13.0", "2.12.0", False, "compiled for torch 2.12.0, but torch 2.13.0 is installed"),
        ("2.13.0+cpu", "2.13.0+cu128", False, r"but torch 2.13.0+cpu is installed"),
        (None, "2.13.0", False, ""),
        ("2.13.0", None, False, ""),
        (None, None, False, ""),
    ],
)
def test_a_framework_must_be_the_one_it_was_compiled_for(
    installed: str | None, built: str | None, works: bool, problem: str
) -> None:
    state = horovod_status._state("torch", installed, built, load=True)
    assert state.works is works
    assert (problem in state.problem) if problem else state.problem == ""


def test_a_library_that_does_not_load_is_a_problem(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(horovod_install, "probe", lambda _: Probe("undefined symbol: x"))
    state = horovod_status._state("torch", "2.13.0", "2.13.0", load=True)
    assert not state.works
    assert "undefined symbol: x" in state.problem
    assert "hpc-dl horovod build" in state.problem
    assert horovod_status._state("torch", "2.13.0", "2.13.0", load=False).problem == ""


def test_names_with_brackets_are_printed_as_they_are(tmp_path: Path, key: Key) -> None:
    """Rich reads [/x] as the end of a style and raises, and [x] as a style and hides it."""
    folder = tmp_path / "wheels [of] [/me]"
    store(folder, replace(key, mpi="MPI [/opt/x]", python="cp[311]"), b"another")
    done = CliRunner().invoke(main, ["horovod", "status", "--wheel-dir", str(folder)])
    assert done.exit_code == 0, done.output
    assert "wheels [of] [/me]" in done.stdout
    assert "MPI [/opt/x]" in done.stdout
    assert "cp[311]" in done.stdout


def test_problems_with_brackets_are_printed_as_they_are(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(horovod_install, "probe", lambda _: Probe("cannot open [/x] [y]"))
    done = CliRunner().invoke(main, ["horovod", "status", "--wheel-dir", str(tmp_path)])
    assert done.exit_code == 1
    assert "cannot open [/x] [y]" in done.stdout


def test_a_build_names_paths_with_brackets(tmp_path: Path, key: Key) -> None:
    folder = tmp_path / "[/a] [b]"
    wheel = store(folder, key)
    arguments = ["horovod", "build", "--no-install", "--wheel-dir", str(folder)]
    done = CliRunner().invoke(main, arguments)
    assert done.exit_code == 0, done.output
    assert str(wheel.path) in done.stderr
