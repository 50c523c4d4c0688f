"""What is installed here that a build of Horovod depends on, found without importing any of it."""

import importlib.metadata
import importlib.util
import platform
import re
import sys
import sysconfig
from dataclasses import dataclass
from functools import cache
from pathlib import Path


@dataclass(frozen=True)
class Framework:
    """An installed framework.

    Args:
        name: ``torch`` or ``tensorflow``.
        version: with the local part, as in ``2.13.0+cpu``.
        cuda: the CUDA that it was built for, or None for a CPU build.
    """

    name: str
    version: str
    cuda: str | None

    def __str__(self) -> str:
        return f"{self.name} {self.version}" + (f" (CUDA {self.cuda})" if self.cuda else "")


def module_folder(module: str) -> Path | None:
    """Return the folder of a top-level package, without importing it."""
    found = importlib.util.find_spec(module)
    if found is None or not found.submodule_search_locations:
        return None
    return Path(found.submodule_search_locations[0])


def module_version(module: str) -> str | None:
    """Return the version of the distribution that brings ``module``; None if there is none."""
    try:
        return importlib.metadata.version(module)
    except importlib.metadata.PackageNotFoundError:
        for name in _distributions().get(module, ()):
            return importlib.metadata.version(name)
    return None


@cache
def _distributions() -> dict[str, list[str]]:
    return {**importlib.metadata.packages_distributions()}


def find_torch() -> Framework | None:
    """Return the installed PyTorch."""
    folder = module_folder("torch")
    if folder is None:
        return None
    text = _text(folder / "version.py")
    version = _assigned(text, "__version__") or module_version("torch") or "unknown"
    return Framework("torch", version, _assigned(text, "cuda"))


def find_tensorflow() -> Framework | None:
    """Return the installed TensorFlow, whatever its distribution is called."""
    folder = module_folder("tensorflow")
    version = module_version("tensorflow")
    if folder is None or version is None:
        return None
    text = _text(folder / "python" / "platform" / "build_info.py")
    found = re.search(r"['\"]cuda_version['\"]\s*[:,]\s*['\"]([\d.]+)['\"]", text)
    return Framework("tensorflow", version, found[1] if found else None)


def _text(path: Path) -> str:
    try:
        return path.read_text(errors="replace")
    except OSError:
        return ""


def _assigned(text: str, name: str) -> str | None:
    r"""Return the string that a module's source assigns to a name.

    >>> _assigned("cuda: Optional[str] = '12.8'\n", "cuda")
    '12.8'
    """
    found = re.search(rf"^{name}\b[^=\n]*=\s*['\"]([^'\"]+)['\"]", text, re.MULTILINE)
    return found[1] if found else None


def python_tag() -> str:
    """Return the Python version and ABI, as in ``cp311`` or ``cp313t``."""
    flags = getattr(sys, "abiflags", "")
    tag = f"{sys.version_info.major}{sys.version_info.minor}{flags}"
    return f"{sys.implementation.name[:2]}{tag}"


def machine() -> str:
    """Return the processor's architecture and those of its extensions that Horovod compiles for."""
    extensions = "+".join(name for name in ("avx", "f16c", "fma") if name in _cpu_flags())
    return f"{platform.machine()}{'-' + extensions if extensions else ''}"


@cache
def _cpu_flags() -> frozenset[str]:
    found = re.search(r"^flags\s*:(.*)$", _text(Path("/proc/cpuinfo")), re.MULTILINE)
    return frozenset(found[1].split()) if found else frozenset()


def python_headers() -> Path:
    """Return the folder where Python.h should be."""
    return Path(sysconfig.get_path("include"))


def nccl_home(given: str | None) -> Path | None:
    """Return where NCCL lies: ``$NCCL_HOME``, NVIDIA's wheel, or the system's folders."""
    candidates = [Path(given)] if given else []
    nvidia = importlib.util.find_spec("nvidia")
    for folder in (nvidia.submodule_search_locations or ()) if nvidia else ():
        candidates.append(Path(folder) / "nccl")
    candidates += [Path("/usr/local/nccl"), Path("/usr/local/cuda"), Path("/usr")]
    for home in candidates:
        if (home / "include" / "nccl.h").is_file():
            return home
    return None


def nccl_version(home: Path) -> str:
    """Read NCCL's version out of its header."""
    text = _text(home / "include" / "nccl.h")
    parts = [re.search(rf"#define\s+NCCL_{part}\s+(\d+)", text) for part in _NCCL_PARTS]
    return ".".join(part[1] for part in parts if part) or "unknown"


_NCCL_PARTS = ("MAJOR", "MINOR", "PATCH")
