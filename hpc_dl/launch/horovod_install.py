"""Install a built Horovod, and find out what an installed one can do."""

import json
import os
import subprocess
import sys
import zipfile
from dataclasses import dataclass, field
from pathlib import Path

from hpc_dl.errors import BuildError
from hpc_dl.launch import environment

_MODULES = {"torch": "horovod.torch", "tensorflow": "horovod.tensorflow"}
_PROBE_TIMEOUT = 180
_INSTALL_TIMEOUT = 300

#: Asks one framework's Horovod what it was built with. In a process of its own: a library that
#: does not fit crashes, and loading a framework is not for the one who only asks.
_PROBE = """
import importlib, json, sys
hvd = importlib.import_module(sys.argv[1])
names = ("mpi", "gloo", "nccl", "cuda", "rocm")
print("built " + json.dumps({name: bool(getattr(hvd, name + "_built")()) for name in names}))
"""


def install(wheel: Path) -> bool:
    """Install a wheel into this environment, unless these very files are installed already.

    Returns:
        whether anything was installed.

    Raises:
        BuildError: pip failed.
    """
    if installed_is(wheel):
        return False
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", "install", "--quiet"]
    command += ["--no-deps", "--no-index", "--force-reinstall", os.fspath(wheel)]
    try:
        answer = subprocess.run(
            command,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=_INSTALL_TIMEOUT,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise BuildError(f"pip could not install {wheel}: {error}") from error
    if answer.returncode != 0:
        raise BuildError(f"pip could not install {wheel}: {answer.stderr.strip()[-500:]}")
    return True


def installed_is(wheel: Path) -> bool:
    """Tell whether the compiled libraries in this environment are those of the wheel."""
    home = environment.module_folder("horovod")
    if home is None:
        return False
    with zipfile.ZipFile(wheel) as content:
        for name in content.namelist():
            if name.endswith((".so", "metadata.json")):
                placed = home.parent / name
                if not placed.is_file() or placed.read_bytes() != content.read(name):
                    return False
    return True


@dataclass(frozen=True)
class Probe:
    """Whether Horovod loads with one framework, and what it was built with.

    Args:
        error: the last line of what went wrong; empty if it loads.
        built: ``mpi``, ``gloo``, ``nccl``, ``cuda``, ``rocm``: built in or not.
    """

    error: str = ""
    built: dict[str, bool] = field(default_factory=dict)


def probe(framework: str) -> Probe:
    """Load Horovod with one framework in a process of its own and ask what it has."""
    command = [sys.executable, "-c", _PROBE, _MODULES[framework]]
    environ = {**os.environ, "TF_CPP_MIN_LOG_LEVEL": "3"}
    try:
        answer = subprocess.run(
            command,
            env=environ,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=_PROBE_TIMEOUT,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return Probe(f"loading it took more than {_PROBE_TIMEOUT} s")
    for line in answer.stdout.splitlines():
        if line.startswith("built "):
            return Probe(built=json.loads(line.removeprefix("built ")))
    said = answer.stderr.strip().splitlines()
    ended = f"loading it ended with exit code {answer.returncode}"
    return Probe(said[-1] if said else ended)


def built_for() -> dict[str, str]:
    """Return the framework versions that the installed Horovod was compiled against."""
    home = environment.module_folder("horovod")
    try:
        data = json.loads((home / "metadata.json").read_text()) if home else {}
    except (OSError, ValueError):
        return {}
    names = {"pytorch": "torch", "tensorflow": "tensorflow"}
    return {names[name]: str(version) for name, version in data.items() if name in names}
