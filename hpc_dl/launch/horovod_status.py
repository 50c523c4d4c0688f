"""Say what is built with what, and whether it fits what is installed now."""

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path

from hpc_dl.errors import HpcDlError
from hpc_dl.launch import environment, horovod_install, horovod_source, wheel_cache
from hpc_dl.launch.horovod_install import Probe
from hpc_dl.launch.horovod_plan import BuildRequest, Frameworks, plan
from hpc_dl.launch.toolchain import Gpu
from hpc_dl.launch.wheel_cache import CachedWheel, Key

_REBUILD = "`hpc-dl horovod build`"


@dataclass(frozen=True)
class FrameworkState:
    """Horovod's state for one framework.

    Args:
        installed: the framework's version here, or None.
        built_for: the version that the installed Horovod was compiled against, or None.
        probe: what came of loading the two together; None if not tried.
        problem: what is wrong, with the remedy; empty if all is well or nothing is built.
    """

    installed: str | None
    built_for: str | None
    probe: Probe | None = None
    problem: str = ""

    @property
    def works(self) -> bool:
        """Tell whether this framework's Horovod can be used."""
        return self.probe is not None and not self.problem


@dataclass(frozen=True)
class Status:
    """The installed Horovod and the cache of wheels.

    Args:
        version: of the installed Horovod, or None.
        frameworks: its state for each framework.
        wheels: those in the cache.
        folder: the cache.
        origin: the wheel that is the installed one; its key says what that was built with.
        differences: what a build made now would be built with instead.
    """

    version: str | None
    frameworks: Mapping[str, FrameworkState] = field(default_factory=dict)
    wheels: tuple[CachedWheel, ...] = ()
    folder: Path = Path()
    origin: CachedWheel | None = None
    differences: tuple[str, ...] = ()

    @property
    def problems(self) -> list[str]:
        """Return what is wrong with the installed Horovod."""
        return [state.problem for state in self.frameworks.values() if state.problem]


def status(folder: Path, environ: Mapping[str, str], *, load: bool = True) -> Status:
    """Find out the state of Horovod here.

    Args:
        folder: the cache of wheels.
        environ: the present environment.
        load: also load it with each framework (seconds); else look at its files only.
    """
    present = {f.name: f for f in (environment.find_torch(), environment.find_tensorflow()) if f}
    version = environment.module_version("horovod") if _is_there() else None
    compiled = horovod_install.built_for()
    states = {}
    for name in ("torch", "tensorflow"):
        framework = present.get(name)
        installed = framework.version if framework else None
        states[name] = _state(name, installed, compiled.get(name), load=load)
    wheels = tuple(wheel_cache.contents(folder))
    origin = next((wheel for wheel in wheels if horovod_install.installed_is(wheel.path)), None)
    differences = _differences(origin.key, folder, environ) if origin else ()
    return Status(version, states, wheels, folder, origin, differences)


def _is_there() -> bool:
    return environment.module_folder("horovod") is not None


def _state(name: str, installed: str | None, built: str | None, *, load: bool) -> FrameworkState:
    if built is None or installed is None:
        return FrameworkState(installed, built)
    if installed != built:
        problem = (
            f"Horovod was compiled for {name} {built}, but {name} {installed} is installed: "
            f"{_REBUILD}"
        )
        return FrameworkState(installed, built, problem=problem)
    if not load:
        return FrameworkState(installed, built)
    found = horovod_install.probe(name)
    problem = f"Horovod does not load with {name}: {found.error}: {_REBUILD}" if found.error else ""
    return FrameworkState(installed, built, found, problem)


def _differences(then: Key, folder: Path, environ: Mapping[str, str]) -> tuple[str, ...]:
    """Compare a key with that of the same kind of build made now."""
    frameworks: Frameworks = "both"
    if then.torch is None or then.tensorflow is None:
        frameworks = "torch" if then.torch else "tensorflow"
    gpu: Gpu = "nccl" if then.gpu == "nccl" else "mpi" if then.gpu == "mpi" else "none"
    try:
        now = plan(BuildRequest(folder, frameworks, gpu), environ).key
    except HpcDlError as error:
        return (f"it could not be built here now: {error}",)
    return tuple(
        f"{part.name}: it was built with {getattr(then, part.name) or 'none'}, now there is "
        f"{getattr(now, part.name) or 'none'}"
        for part in fields(Key)
        if getattr(then, part.name) != getattr(now, part.name)
    )


def as_json(state: Status) -> dict[str, object]:
    """Return the status in words that JSON knows."""
    return {
        "horovod": state.version,
        "source": f"{horovod_source.VERSION} + patches {horovod_source.patches_digest()}",
        "frameworks": {
            name: {
                "installed": framework.installed,
                "built_for": framework.built_for,
                "built_with": framework.probe.built if framework.probe else {},
                "works": framework.works,
                "problem": framework.problem,
            }
            for name, framework in state.frameworks.items()
        },
        "installed_wheel": _wheel_as_json(state.origin) if state.origin else None,
        "differences": list(state.differences),
        "wheel_folder": str(state.folder),
        "wheels": [_wheel_as_json(wheel) for wheel in state.wheels],
    }


def _wheel_as_json(wheel: CachedWheel) -> dict[str, object]:
    key = wheel.key
    return {"path": str(wheel.path), "seconds": wheel.seconds, "digest": key.digest, **vars(key)}
