"""Decide which Horovod to build here: for which frameworks, with which tools, under which key."""

import shlex
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from hpc_dl.errors import MissingComponentError, OptionError
from hpc_dl.launch import environment, horovod_source, toolchain
from hpc_dl.launch.environment import Framework
from hpc_dl.launch.toolchain import Gpu, Mpi, Toolchain
from hpc_dl.launch.wheel_cache import Key

Frameworks = Literal["auto", "torch", "tensorflow", "both"]


@dataclass(frozen=True)
class BuildRequest:
    """What to build.

    Args:
        frameworks: ``auto`` takes those that are installed.
        gpu: how GPUs talk; None takes ``nccl`` if a framework is built for CUDA, else ``none``.
        jobs: files compiled at once; None for what cores and memory allow.
        wheel_folder: the cache of wheels.
        sdist: Horovod's source archive, if it is already here.
        force: build even if a fitting wheel is in the cache.
        timeout: seconds for the build.
    """

    wheel_folder: Path
    frameworks: Frameworks = "auto"
    gpu: Gpu | None = None
    jobs: int | None = None
    sdist: Path | None = None
    force: bool = False
    timeout: float = 7200.0

    def __post_init__(self) -> None:
        if self.jobs is not None and self.jobs < 1:
            raise OptionError(f"--jobs {self.jobs}: the number of jobs must be 1 or more")
        if not self.timeout > 0:  # nor is nan
            raise OptionError(f"--timeout {self.timeout:g}: give a number of seconds above 0")


@dataclass(frozen=True)
class BuildPlan:
    """A build that can be done here: for which frameworks, with which tools, under which key."""

    frameworks: tuple[Framework, ...]
    gpu: Gpu
    tools: Toolchain
    mpi: Mpi
    key: Key


def select_frameworks(wanted: Frameworks, installed: list[Framework]) -> tuple[Framework, ...]:
    """Return the frameworks to build for.

    Raises:
        MissingComponentError: one that is wanted is not installed, or none is.
    """
    names = {"auto": [f.name for f in installed], "both": ["torch", "tensorflow"]}
    chosen = []
    for name in names.get(wanted, [wanted]):
        found = next((framework for framework in installed if framework.name == name), None)
        if found is None:
            raise MissingComponentError(
                f"--framework {wanted}: {name} is not installed in {sys.prefix}; "
                f"`pip install 'hpc_dl[{name}]'`, or name another framework"
            )
        chosen.append(found)
    if not chosen:
        raise MissingComponentError(
            "neither torch nor tensorflow is installed, and Horovod is compiled against them; "
            "`pip install 'hpc_dl[torch]'` or `pip install 'hpc_dl[tensorflow]'`"
        )
    return tuple(chosen)


def plan(request: BuildRequest, environ: Mapping[str, str]) -> BuildPlan:
    """Decide what to build, and under which key; whether it can be built shows ``plan.tools``.

    Raises:
        MissingComponentError: a framework is missing, or a tool without which there is no key.
    """
    installed = [f for f in (environment.find_torch(), environment.find_tensorflow()) if f]
    frameworks = select_frameworks(request.frameworks, installed)
    gpu = request.gpu or _default_gpu(frameworks, environ)
    if gpu != "none" and not any(framework.cuda for framework in frameworks):
        raise OptionError(
            f"--gpu {gpu}: {' and '.join(map(str, frameworks))} are CPU builds; install CUDA "
            "builds, or pass --gpu none"
        )
    tools = toolchain.inspect(gpu, environ, Path(tempfile.gettempdir()))
    # A wheel from the cache needs no compiler, only what its key names.
    if (
        tools.mpi is None
        or (gpu != "none" and not tools.nvcc)
        or (gpu == "nccl" and not tools.nccl)
    ):
        tools.require()
    if tools.mpi is None:
        raise MissingComponentError("no MPI was found")
    key = _key(frameworks, gpu, tools, tools.mpi, _settings(environ))
    return BuildPlan(frameworks, gpu, tools, tools.mpi, key)


#: What cmake reads of the environment, beside Horovod's own HOROVOD_BUILD_*.
_COMPILER_VARIABLES = (
    *("CC", "CXX", "CFLAGS", "CXXFLAGS", "CPPFLAGS", "LDFLAGS"),
    *("CUDACXX", "CUDAFLAGS", "CUDAHOSTCXX"),
)


def _settings(environ: Mapping[str, str]) -> str | None:
    set_here = [
        f"{name}={value}"
        for name, value in sorted(environ.items())
        if value and (name.startswith("HOROVOD_BUILD_") or name in _COMPILER_VARIABLES)
    ]
    return shlex.join(set_here) or None


def _default_gpu(frameworks: tuple[Framework, ...], environ: Mapping[str, str]) -> Gpu:
    for_cuda = [framework for framework in frameworks if framework.cuda]
    if not for_cuda:
        return "none"
    if toolchain.find_nvcc(environ) is None:
        # A Horovod without GPUs would make training on them slow, and say nothing.
        raise MissingComponentError(
            f"{' and '.join(map(str, for_cuda))} use GPUs, but there is no CUDA compiler (nvcc) to "
            "build Horovod for them: `module load cuda` or set CUDA_HOME; or pass --gpu none"
        )
    return "nccl"


def _key(
    frameworks: tuple[Framework, ...],
    gpu: Gpu,
    tools: Toolchain,
    mpi: Mpi,
    settings: str | None = None,
) -> Key:
    versions = {framework.name: _full_version(framework) for framework in frameworks}
    nccl = f", NCCL {environment.nccl_version(tools.nccl)}" if tools.nccl else ""
    return Key(
        horovod=horovod_source.VERSION,
        patches=horovod_source.patches_digest(),
        python=environment.python_tag(),
        machine=environment.machine(),
        torch=versions.get("torch"),
        tensorflow=versions.get("tensorflow"),
        mpi=f"{mpi.version} ({mpi.place})",
        gpu=gpu,
        cuda=f"CUDA {tools.cuda}{nccl}" if gpu != "none" else None,
        settings=settings,
    )


def _full_version(framework: Framework) -> str:
    local = "+" in framework.version or framework.cuda is None
    return framework.version if local else f"{framework.version}+cuda{framework.cuda}"
