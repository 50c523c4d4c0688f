"""A built library looks for others beside where it is installed, not where it was built."""

import shutil
import struct
import subprocess
import zipfile
from pathlib import Path

import pytest

from hpc_dl.errors import BuildError
from hpc_dl.launch import elf, horovod_build, wheel_contents
from hpc_dl.launch.environment import Framework
from hpc_dl.launch.horovod_plan import BuildPlan, BuildRequest
from hpc_dl.launch.toolchain import Mpi, Toolchain
from hpc_dl.launch.wheel_cache import Key

TORCH = Framework("torch", "2.13.0+cpu", None)
LIBRARY = "horovod/torch/mpi_lib_v2.cpython-311-x86_64-linux-gnu.so"
RPATH, RUNPATH = 15, 29


def library(*paths: str, tag: int = RUNPATH, order: str = "<") -> bytes:
    """Return the least of a shared library: headers, a dynamic section, its strings."""
    strings = b"\0libmpi.so.40\0" + ":".join(paths).encode() + b"\0"
    base, headers = 0x10000, 64 + 2 * 56
    entries = [(1, 1), (5, base + headers + 5 * 16), (10, len(strings))]
    entries += [(tag, 14)] if paths else []
    dynamic = b"".join(struct.pack(f"{order}qQ", *entry) for entry in [*entries, (0, 0)])
    dynamic = dynamic.ljust(5 * 16, b"\0")
    size = headers + len(dynamic) + len(strings)
    ident = b"\x7fELF" + bytes([2, 1 if order == "<" else 2, 1]) + bytes(9)
    header = struct.pack(f"{order}HHIQQQIHHHHHH", 3, 62, 1, 0, 64, 0, 0, 64, 56, 2, 0, 0, 0)
    load = struct.pack(f"{order}IIQQQQQQ", 1, 5, 0, base, base, size, size, 4096)
    spot = struct.pack(f"{order}IIQQQQQQ", 2, 6, headers, base + headers, 0, len(dynamic), 0, 8)
    return ident + header + load + spot + dynamic + strings


@pytest.mark.parametrize("tag", [RPATH, RUNPATH])
@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize("paths", [(), ("$ORIGIN/..",), ("$ORIGIN/..", "/tmp/a b/lib")])
def test_run_paths_are_read(paths: tuple[str, ...], order: str, tag: int) -> None:
    assert elf.run_paths(library(*paths, tag=tag, order=order)) == list(paths)


@pytest.mark.parametrize("damage", [b"", b"not a library", library("x")[:100], library("x")[:-4]])
def test_what_is_no_library_is_refused(damage: bytes) -> None:
    with pytest.raises(BuildError, match="library"):
        elf.run_paths(damage)


def test_run_paths_of_a_real_library(tmp_path: Path) -> None:
    compiler = shutil.which("cc")
    if compiler is None:
        pytest.skip("no C compiler to make a library with")
    wanted = ["$ORIGIN/../lib", "/opt/some where/lib"]
    (tmp_path / "a.c").write_text("int f(void) { return 1; }\n")
    command = [compiler, "-shared", "-fPIC", "-o", "a.so", "a.c"]
    command += [f"-Wl,-rpath,{path}" for path in wanted]
    subprocess.run(command, cwd=tmp_path, check=True, timeout=60)
    assert elf.run_paths((tmp_path / "a.so").read_bytes()) == wanted


def wheel(folder: Path, content: bytes) -> Path:
    path = folder / "horovod.whl"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(LIBRARY, content)
    return path


def planned(mpi: Mpi, nccl: Path | None = None) -> BuildPlan:
    key = Key("0.28.1", "a", "cp311", "x86_64", "2", None, "MPI", "none", None)
    return BuildPlan((TORCH,), "none", Toolchain(mpi, None, None, nccl, ()), mpi, key)


OWN = Mpi(Path("/env/bin/mpicxx"), "5", "environment")


@pytest.mark.parametrize(
    "paths", [(), ("$ORIGIN/../../../..", "$ORIGIN/../../nvidia/nccl/lib"), ("$ORIGIN",)]
)
def test_relative_paths_are_fine(tmp_path: Path, paths: tuple[str, ...]) -> None:
    built = wheel(tmp_path, library(*paths))
    wheel_contents.check_contents(built, planned(OWN), {}, tmp_path / "log")


@pytest.mark.parametrize("path", ["/tmp/build/lib", "", ".", "lib", "$ORIGINAL/lib"])
def test_a_path_of_the_machine_that_built_it_is_refused(tmp_path: Path, path: str) -> None:
    """Whoever can write there later could plant a library; elsewhere it leads nowhere."""
    built = wheel(tmp_path, library("$ORIGIN/../../../..", path))
    with pytest.raises(BuildError, match="run path") as caught:
        wheel_contents.check_contents(built, planned(OWN), {}, tmp_path / "log")
    assert repr(path) in str(caught.value)
    assert LIBRARY in str(caught.value)


def test_what_the_user_asks_the_linker_for_is_kept(tmp_path: Path) -> None:
    environ = {"LDFLAGS": "-O1 -Wl,-rpath,/opt/gcc/lib64 -Wl,-rpath=/opt/b"}
    built = wheel(tmp_path, library("$ORIGIN", "/opt/gcc/lib64", "/opt/b"))
    wheel_contents.check_contents(built, planned(OWN), environ, tmp_path / "log")
    with pytest.raises(BuildError, match="run path"):
        wheel_contents.check_contents(
            wheel(tmp_path, library("/opt/gcc")), planned(OWN), environ, tmp_path / "log"
        )


def test_an_mpi_of_the_site_is_found_where_it_is(tmp_path: Path) -> None:
    """It is not beside the wheel, and its place is part of the wheel's key."""
    prefix = tmp_path / "site" / "openmpi"
    (prefix / "lib").mkdir(parents=True)
    (prefix / "lib64").mkdir()
    (prefix / "lib" / "libmpi.so.40").touch()
    nccl = tmp_path / "site" / "nccl"
    (nccl / "lib").mkdir(parents=True)
    (nccl / "lib" / "libnccl.so.2").touch()
    chosen = planned(Mpi(prefix / "bin" / "mpicxx", "5", str(prefix)), nccl)
    expected = [str(prefix / "lib"), str(nccl / "lib")]
    assert wheel_contents.site_paths(chosen) == expected
    assert wheel_contents.site_paths(planned(OWN)) == []
    place = horovod_build.BuildPlace(tmp_path / "python", ())
    told = horovod_build.build_environment(
        BuildRequest(tmp_path), chosen, place, {}, tmp_path / "cache"
    )
    assert told["HPC_DL_RUN_PATHS"] == ";".join(expected)
    built = wheel(tmp_path, library("$ORIGIN", *expected))
    wheel_contents.check_contents(built, chosen, {}, tmp_path / "log")


def test_the_systems_own_libraries_need_no_path(tmp_path: Path) -> None:
    chosen = planned(Mpi(Path("/usr/bin/mpicxx"), "5", "/usr"), Path("/usr"))
    assert wheel_contents.site_paths(chosen) == []
