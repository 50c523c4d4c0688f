"""A cached wheel is used where nothing can be compiled or written; settings mean another wheel."""

import errno
import fcntl
import json
import os
from pathlib import Path

import pytest

from hpc_dl.errors import BuildError, MissingComponentError
from hpc_dl.launch import environment, horovod_build, toolchain, wheel_cache
from hpc_dl.launch.environment import Framework
from hpc_dl.launch.horovod_plan import BuildRequest, plan
from hpc_dl.launch.toolchain import Mpi, Toolchain
from hpc_dl.launch.wheel_cache import CachedWheel, Key

TORCH = Framework("torch", "2.13.0+cpu", None)
CUDA_TORCH = Framework("torch", "2.13.0", "12.8")
MPI = Mpi(Path("/opt/mpi/bin/mpicxx"), "mpirun (Open MPI) 5.0.11", "/opt/mpi")
BARE = Toolchain(MPI, None, None, None, ("no C++ compiler",))


@pytest.fixture(autouse=True)
def _machine_without_a_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(environment, "find_torch", lambda: TORCH)
    monkeypatch.setattr(environment, "find_tensorflow", lambda: None)
    monkeypatch.setattr(toolchain, "inspect", lambda *_: BARE)


def store(folder: Path, key: Key) -> CachedWheel:
    built = folder / "horovod.whl"
    built.write_bytes(b"a wheel")
    return wheel_cache.store(folder, key, built, 1.0)


def ignore(_: int) -> None:
    pass


def test_a_cached_wheel_needs_no_compiler(tmp_path: Path) -> None:
    request = BuildRequest(tmp_path)
    chosen = plan(request, {})
    stored = store(tmp_path, chosen.key)
    assert horovod_build.build(request, chosen, {}, ignore) == stored


@pytest.mark.parametrize("cached", [True, False])
def test_a_build_needs_one(tmp_path: Path, cached: bool) -> None:
    request = BuildRequest(tmp_path, force=cached)
    chosen = plan(request, {})
    if cached:
        store(tmp_path, chosen.key)
    with pytest.raises(MissingComponentError, match=r"no C\+\+ compiler"):
        horovod_build.build(request, chosen, {}, ignore)


@pytest.mark.parametrize(
    ("gpu", "tools"),
    [
        ("none", Toolchain(None, None, None, None, ("no MPI: ...",))),
        ("mpi", Toolchain(MPI, None, None, None, ("no nvcc: ...",))),
        ("nccl", Toolchain(MPI, Path("nvcc"), "13.0", None, ("no NCCL: ...",))),
    ],
)
def test_what_the_key_is_made_of_is_needed_always(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, gpu: toolchain.Gpu, tools: Toolchain
) -> None:
    monkeypatch.setattr(environment, "find_torch", lambda: CUDA_TORCH)
    monkeypatch.setattr(toolchain, "inspect", lambda *_: tools)
    with pytest.raises(MissingComponentError, match=r"no \w+: \.\.\."):
        plan(BuildRequest(tmp_path, gpu=gpu), {})


def test_a_cached_wheel_is_found_without_writing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A shared cache may be read-only for all but one."""
    request = BuildRequest(tmp_path)
    chosen = plan(request, {})
    stored = store(tmp_path, chosen.key)
    before = sorted(tmp_path.rglob("*"))

    def refuse(*_: object) -> None:
        raise BuildError("cannot write")

    monkeypatch.setattr(wheel_cache, "locked", refuse)
    assert horovod_build.build(request, chosen, {}, ignore) == stored
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("number", ["ENOSYS", "ENOLCK", "EOPNOTSUPP"])
def test_a_file_system_without_locks_is_told_and_used(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    number: str,
) -> None:
    def flock(*_: object) -> None:
        raise OSError(getattr(errno, number), "no locks here")

    monkeypatch.setattr(fcntl, "flock", flock)
    key = plan(BuildRequest(tmp_path), {}).key
    with wheel_cache.locked(tmp_path, key, "waiting"):
        pass
    told = capsys.readouterr().err
    assert str(tmp_path) in told
    assert "no locks here" in told
    assert "waiting" not in told


@pytest.mark.parametrize("name", ["copyfile", "mkstemp"])
def test_a_wheel_that_cannot_be_kept_names_the_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    key = plan(BuildRequest(tmp_path), {}).key
    monkeypatch.setattr(f"{'shutil' if name == 'copyfile' else 'tempfile'}.{name}", fail)
    with pytest.raises(BuildError, match="No space left on device") as caught:
        store(tmp_path, key)
    assert str(tmp_path) in str(caught.value)
    assert "--wheel-dir" in str(caught.value)


def test_a_build_that_cannot_write_is_explained(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    request = BuildRequest(tmp_path)
    monkeypatch.setattr(toolchain, "inspect", lambda *_: Toolchain(MPI, None, None, None, ()))

    def fail(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(horovod_build.horovod_source, "fetch", fail)
    with pytest.raises(BuildError, match="No space left on device") as caught:
        horovod_build.build(request, plan(request, {}), {}, ignore)
    assert str(tmp_path) in str(caught.value)


def test_settings_are_part_of_the_key(tmp_path: Path) -> None:
    request = BuildRequest(tmp_path)
    plain = plan(request, {"PATH": "/bin", "HOROVOD_CYCLE_TIME": "1"}).key
    assert plain.settings is None
    seen = {plain.digest}
    for environ in (
        {"HOROVOD_BUILD_CUDA_CC_LIST": "80,90"},
        {"HOROVOD_BUILD_CUDA_CC_LIST": "80"},
        {"HOROVOD_BUILD_ARCH_FLAGS": "-march=native"},
        {"CXX": "g++-12"},
        {"CC": "gcc-12", "CXX": "g++-12"},
        {"CXXFLAGS": "-O1"},
    ):
        key = plan(request, environ).key
        assert key.settings is not None
        assert all(name in key.settings for name in environ)
        seen.add(key.digest)
    assert len(seen) == 7
    one, other = {"CC": "gcc", "CXX": "g++"}, {"CXX": "g++", "CC": "gcc"}
    assert plan(request, one).key == plan(request, other).key


def test_without_settings_keys_and_metadata_are_as_they_were(tmp_path: Path) -> None:
    """Wheels from before there were settings in the key keep fitting."""
    key = Key(
        horovod="0.28.1",
        patches="6155ee76069e9169",
        python="cp311",
        machine="x86_64-avx+f16c+fma",
        torch="2.13.0+cpu",
        tensorflow="2.21.0",
        mpi="mpirun (Open MPI) 5.0.11 (environment)",
        gpu="none",
        cuda=None,
    )
    assert key.name == "horovod-0.28.1-cp311-torch2.13.0+cpu-tf2.21.0-881bf80c99c337f0"
    metadata = store(tmp_path, key).path.parent / wheel_cache.METADATA
    data = json.loads(metadata.read_text())
    data["key"].pop("settings", None)
    metadata.write_text(json.dumps(data))
    assert wheel_cache.find(tmp_path, key) is not None


def test_a_gpu_framework_without_nvcc_is_not_built_for_cpus_in_silence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(environment, "find_torch", lambda: CUDA_TORCH)
    monkeypatch.setattr(toolchain, "find_nvcc", lambda _: None)
    with pytest.raises(MissingComponentError, match=r"nvcc.*--gpu none"):
        plan(BuildRequest(tmp_path), {})
    assert plan(BuildRequest(tmp_path, gpu="none"), {}).gpu == "none"


def test_a_cache_that_cannot_be_read_is_empty(tmp_path: Path) -> None:
    assert wheel_cache.contents(tmp_path / ("long" * 100)) == []  # the system refuses the name
    (tmp_path / "file").touch()
    assert wheel_cache.contents(tmp_path / "file") == []


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read every folder")
def test_a_closed_folder_is_empty(tmp_path: Path) -> None:
    closed = tmp_path / "closed"
    closed.mkdir(mode=0)
    assert wheel_cache.contents(closed / "wheels") == []


@pytest.fixture
def nobody(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Take away the home folder, as in a container run with a user's number alone."""

    def home() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "home", home)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    return tmp_path / f"hpc_dl-{os.getuid()}"


def test_without_a_home_the_cache_is_a_private_temporary_folder(nobody: Path) -> None:
    for _ in range(2):
        assert wheel_cache.default_folder({}) == nobody / "wheels"
        assert nobody.stat().st_mode & 0o777 == 0o700
    assert wheel_cache.default_folder({"XDG_CACHE_HOME": "/x"}) == Path("/x/hpc_dl/wheels")


@pytest.mark.parametrize("trap", ["open", "link", "file", "another user's"])
def test_a_temporary_folder_that_others_can_write_is_refused(
    nobody: Path, monkeypatch: pytest.MonkeyPatch, trap: str
) -> None:
    match trap:
        case "open":
            nobody.mkdir()
            nobody.chmod(0o777)
        case "link":
            (nobody.parent / "elsewhere").mkdir(mode=0o700)
            nobody.symlink_to(nobody.parent / "elsewhere")
        case "file":
            nobody.touch(mode=0o600)
        case _:
            nobody.mkdir(mode=0o700)
            other = os.getuid() + 1
            monkeypatch.setattr(os, "getuid", lambda: other)
            nobody.rename(nobody.parent / f"hpc_dl-{os.getuid()}")
    with pytest.raises(BuildError, match="--wheel-dir"):
        wheel_cache.default_folder({})
