"""Build Horovod's wheel, once for each combination of frameworks, MPI and GPU libraries."""

import os
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path

from hpc_dl.errors import BuildError
from hpc_dl.launch import environment, horovod_source, toolchain, wheel_cache, wheel_contents
from hpc_dl.launch.build_place import BuildPlace, build_place
from hpc_dl.launch.horovod_compile import Progress, compile_wheel
from hpc_dl.launch.horovod_plan import BuildPlan, BuildRequest
from hpc_dl.launch.wheel_cache import CachedWheel


def build(
    request: BuildRequest, chosen: BuildPlan, environ: Mapping[str, str], progress: Progress
) -> CachedWheel:
    """Return the fitting wheel from the cache, or build it.

    Args:
        request: what was asked for.
        chosen: what `plan` made of it.
        environ: the present environment.
        progress: told how far the build is.

    Raises:
        MissingComponentError: a tool for the build is missing; all are listed.
        BuildError: the build failed; the message has the first error and the likely remedy.
    """
    folder, key = request.wheel_folder, chosen.key
    # Before the lock, which a shared cache that is read-only here does not give.
    found = None if request.force else wheel_cache.find(folder, key)
    if found is not None:
        return found
    chosen.tools.require()
    try:
        return _build(request, chosen, environ, progress)
    except OSError as error:
        raise BuildError(
            f"the build could not read or write its files in {tempfile.gettempdir()} and {folder}: "
            f"{error}; set TMPDIR and --wheel-dir to where about 1 GB is free"
        ) from error


def _build(
    request: BuildRequest, chosen: BuildPlan, environ: Mapping[str, str], progress: Progress
) -> CachedWheel:
    folder, key = request.wheel_folder, chosen.key
    waiting = f"another build of {key.name} is under way; waiting for it"
    with wheel_cache.locked(folder, key, waiting):
        found = wheel_cache.find(folder, key)
        if found is not None and not request.force:  # by the one that held the lock
            return found
        archive = horovod_source.fetch(folder, request.sdist)
        with (
            tempfile.TemporaryDirectory(prefix="horovod-") as scratch,
            build_place(chosen.mpi, folder) as place,
        ):
            source = horovod_source.unpack(archive, Path(scratch))
            horovod_source.apply_patches(source)
            settings = build_environment(request, chosen, place, environ, folder)
            log = folder / key.name / wheel_cache.LOG
            start = time.monotonic()
            built = compile_wheel(source, place, settings, log, request.timeout, progress)
            wheel_contents.check_contents(built, chosen, environ, log)
            return wheel_cache.store(folder, key, built, time.monotonic() - start)


def build_environment(
    request: BuildRequest,
    chosen: BuildPlan,
    place: BuildPlace,
    environ: Mapping[str, str],
    cache: Path,
) -> dict[str, str]:
    """Return the variables that tell Horovod's build what to build, and with what."""
    names = {framework.name for framework in chosen.frameworks}
    path = [*map(os.fspath, place.path), environ.get("PATH", os.defpath)]
    kept = {name: value for name, value in environ.items() if not name.startswith("HOROVOD_")}
    # What a user sets beyond our own choices (compute capabilities, arch flags) is respected.
    extra = {
        name: value
        for name, value in environ.items()
        if name.startswith("HOROVOD_BUILD_") or name == "HOROVOD_CMAKE"
    }
    settings = {
        **kept,
        **extra,
        "PATH": os.pathsep.join(path),
        "MAKEFLAGS": f"-j{request.jobs or toolchain.default_jobs()}",
        # CMake 4 refuses the old policy version that Gloo asks for.
        "CMAKE_POLICY_VERSION_MINIMUM": "3.5",
        "HOROVOD_WITH_MPI": "1",
        "HOROVOD_WITH_GLOO": "1",
        "HOROVOD_WITHOUT_MXNET": "1",
        "HOROVOD_WITH_PYTORCH" if "torch" in names else "HOROVOD_WITHOUT_PYTORCH": "1",
        "HOROVOD_WITH_TENSORFLOW" if "tensorflow" in names else "HOROVOD_WITHOUT_TENSORFLOW": "1",
        "TF_CPP_MIN_LOG_LEVEL": "2",
        # For our patch of the run path.
        "HPC_DL_RUN_PATHS": ";".join(wheel_contents.site_paths(chosen)),
    }
    tools = chosen.tools
    if tools.nvcc is not None:
        home = os.fspath(tools.nvcc.parent.parent)
        settings |= {"HOROVOD_GPU_OPERATIONS": chosen.gpu.upper(), "HOROVOD_CUDA_HOME": home}
        settings["CUDA_HOME"] = home
    if tools.nccl is not None:
        linked = _linkable_nccl(tools.nccl, cache)
        settings |= {"HOROVOD_NCCL_HOME": os.fspath(linked), "HOROVOD_NCCL_LINK": "SHARED"}
    return settings


def _linkable_nccl(home: Path, cache: Path) -> Path:
    """Return a folder with ``libnccl.so``, which NVIDIA's wheel has only as ``libnccl.so.2``."""
    libraries = [home / name / "libnccl.so" for name in ("lib", "lib64")]
    versioned = home / "lib" / "libnccl.so.2"
    if any(library.exists() for library in libraries) or not versioned.exists():
        return home
    linked = cache / f"nccl-{environment.nccl_version(home)}"
    (linked / "lib").mkdir(parents=True, exist_ok=True)
    for link, target in (
        (linked / "include", home / "include"),
        (linked / "lib" / "libnccl.so", versioned),
    ):
        link.unlink(missing_ok=True)
        link.symlink_to(target)
    return linked
