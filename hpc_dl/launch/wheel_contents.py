"""Look into a wheel that was built: is all in it, and does it lead to no foreign folder."""

import os
import re
import sys
import zipfile
from collections.abc import Mapping
from pathlib import Path

from hpc_dl.errors import BuildError
from hpc_dl.launch import elf
from hpc_dl.launch.horovod_plan import BuildPlan

_RPATH_OPTION = re.compile(r"-Wl,-rpath[=,]([^\s,]+)")
_LIBRARIES = {"torch": "horovod/torch/mpi_lib_v2", "tensorflow": "horovod/tensorflow/mpi_lib"}


def site_paths(chosen: BuildPlan) -> list[str]:
    """Return the folders of libraries that lie neither in this environment nor in the system's.

    These belong to the site and to the wheel's key; all others are found from where the wheel is
    installed, or by the loader.
    """
    own = Path(sys.prefix).resolve()
    searched = [] if chosen.mpi.place == "environment" else [(Path(chosen.mpi.place), "libmpi")]
    if chosen.tools.nccl is not None and not chosen.tools.nccl.resolve().is_relative_to(own):
        searched.append((chosen.tools.nccl, "libnccl"))
    return [
        os.fspath(home / name)
        for home, library in searched
        if home != Path("/usr")
        for name in ("lib", "lib64")
        if any((home / name).glob(f"{library}*.so*"))
    ]


def check_contents(wheel: Path, chosen: BuildPlan, environ: Mapping[str, str], log: Path) -> None:
    """Refuse a wheel that lacks a framework, or whose libraries look for others in odd places.

    Args:
        wheel: the file.
        chosen: what was to be built.
        environ: the environment of the build.
        log: of the build, for messages.

    Raises:
        BuildError: what is wrong with it.
    """
    with zipfile.ZipFile(wheel) as content:
        libraries = {n: content.read(n) for n in content.namelist() if n.endswith(".so")}
    for framework in chosen.frameworks:
        if not any(name.startswith(_LIBRARIES[framework.name]) for name in libraries):
            raise BuildError(f"the build left out {framework.name}; see its log: {log}")
    # What a user tells the linker is the user's affair, and part of the key.
    allowed = {*site_paths(chosen), *_RPATH_OPTION.findall(environ.get("LDFLAGS", ""))}
    for name, library in libraries.items():
        for path in elf.run_paths(library):
            if path not in allowed and path != "$ORIGIN" and not path.startswith("$ORIGIN/"):
                raise BuildError(
                    f"{name} has a run path of the machine that built it, {path!r}, where others "
                    f"may put libraries; see the build's log: {log}"
                )
