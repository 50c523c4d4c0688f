"""Build Horovod's wheel, once for each combination of frameworks, MPI and GPU libraries."""

import os
import signal
import subprocess
import tempfile
import time
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path

from hpc_dl.errors import BuildError
from hpc_dl.launch import compiler_log, environment, horovod_source, toolchain, wheel_cache
from hpc_dl.launch.build_place import BuildPlace, build_place
from hpc_dl.launch.environment import Framework
from hpc_dl.launch.horovod_plan import BuildPlan, BuildRequest
from hpc_dl.launch.wheel_cache import CachedWheel

#: Called with the share of the build that is done (0 to 100) as it goes on.
Progress = Callable[[int], None]


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
        BuildError: the build failed; the message has the first error and the likely remedy.
    """
    folder, key = request.wheel_folder, chosen.key
    waiting = f"another build of {key.name} is under way; waiting for it"
    with wheel_cache.locked(folder, key, waiting):
        found = wheel_cache.find(folder, key)
        if found is not None and not request.force:
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
            built = _compile(source, place, settings, log, request.timeout, progress)
            _check_contents(built, chosen.frameworks, log)
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


def _compile(
    source: Path,
    place: BuildPlace,
    settings: Mapping[str, str],
    log: Path,
    timeout: float,
    progress: Progress,
) -> Path:
    """Run the build in its own process group, its output in ``log``; return the wheel."""
    output = source.parent / "wheel"
    command = [os.fspath(place.python), "-m", "pip", "--disable-pip-version-check", "wheel"]
    command += ["-v", "--no-deps", "--no-build-isolation", "--no-cache-dir"]
    command += ["-w", os.fspath(output), os.fspath(source)]
    deadline = time.monotonic() + timeout
    with log.open("wb") as file:
        try:
            pip = subprocess.Popen(
                command,
                env=dict(settings),
                cwd=source.parent,
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        except OSError as error:
            raise BuildError(f"could not start the build: {error}") from error
        try:
            with log.open("r", errors="replace") as tail:
                while pip.poll() is None:
                    if time.monotonic() > deadline:
                        raise BuildError(
                            f"the build was not done after {timeout:g} s and was stopped; raise "
                            f"--timeout or --jobs. Its log: {log}"
                        )
                    for done in filter(None, map(compiler_log.percentage, tail)):
                        progress(done)
                    time.sleep(0.2)
        finally:
            if pip.poll() is None:
                os.killpg(pip.pid, signal.SIGKILL)
                pip.wait()
    wheels = sorted(output.glob("*.whl"))
    if pip.returncode != 0 or not wheels:
        raise _failed(log)
    progress(100)
    return wheels[0]


def _failed(log: Path) -> BuildError:
    failure = compiler_log.diagnose(log.read_text(errors="replace"))
    excerpt = "\n".join(f"    {line}" for line in failure.excerpt)
    return BuildError(
        f"Horovod's build failed. The first error (full log: {log}):\n\n{excerpt}\n\n"
        f"Likely remedy: {failure.remedy}"
    )


_LIBRARIES = {"torch": "horovod/torch/mpi_lib_v2", "tensorflow": "horovod/tensorflow/mpi_lib"}


def _check_contents(wheel: Path, frameworks: tuple[Framework, ...], log: Path) -> None:
    with zipfile.ZipFile(wheel) as content:
        names = content.namelist()
    for framework in frameworks:
        stem = _LIBRARIES[framework.name]
        if not any(name.startswith(stem) and name.endswith(".so") for name in names):
            raise BuildError(f"the build left out {framework.name}; see its log: {log}")
