"""A way into this Python environment without spaces in its path, for build tools that need one.

TensorFlow's flags, Horovod's cmake files and Open MPI's compiler wrapper all cut paths at spaces.
Through a symbolic link the same environment has another name: Python finds its packages, and cmake
its headers, relative to how they were called.
"""

import contextlib
import os
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from hpc_dl.errors import BuildError
from hpc_dl.launch.toolchain import Mpi

_WRAPPER = """\
#!/bin/bash
export OPAL_PREFIX={prefix}
exec -a "$(basename "$0")" {prefix}/bin/{program} "$@"
"""

#: cmake takes the compiler wrappers that lie beside the mpiexec it finds.
_WRAPPED = {"mpicc": "opal_wrapper", "mpicxx": "opal_wrapper", "mpiexec": "mpiexec"}


@dataclass(frozen=True)
class BuildPlace:
    """The names under which a build calls this environment.

    Args:
        python: the interpreter.
        path: folders to put first on the PATH.
    """

    python: Path
    path: tuple[Path, ...]


@contextlib.contextmanager
def build_place(mpi: Mpi, cache: Path) -> Iterator[BuildPlace]:
    """Yield names of Python and of the MPI's compiler wrapper that hold no space.

    Args:
        mpi: the MPI to build with.
        cache: the wheel cache; the link lies there, as what is linked may remember its name.
    """
    own = Path(sys.executable).parent
    if " " not in sys.prefix and " " not in os.fspath(mpi.mpicxx):
        # The MPI in use goes first; tools of this environment (cmake) before the system's.
        yield BuildPlace(Path(sys.executable), (mpi.mpicxx.parent, own))
        return
    if mpi.place != "environment" and " " in os.fspath(mpi.mpicxx):
        raise BuildError(
            f"the MPI lies in a path with spaces ({mpi.mpicxx}): no build tool bears it"
        )
    parent = None if " " in os.fspath(cache) else cache
    with tempfile.TemporaryDirectory(prefix="env-", dir=parent) as name:
        folder = Path(name)
        if " " in name:
            raise BuildError(
                f"this environment ({sys.prefix}), the wheel cache and the folder for temporary "
                "files all have spaces in their paths, which TensorFlow's build flags do not bear: "
                "set TMPDIR to a path without"
            )
        alias = folder / "env"
        alias.symlink_to(sys.prefix, target_is_directory=True)
        path = [alias / "bin"]
        if mpi.place == "environment":
            path.insert(0, _wrappers(folder, alias))
        else:
            path.insert(0, mpi.mpicxx.parent)
        yield BuildPlace(alias / "bin" / Path(sys.executable).name, tuple(path))


def _wrappers(folder: Path, alias: Path) -> Path:
    place = folder / "mpi" / "bin"
    place.mkdir(parents=True)
    for name, program in _WRAPPED.items():
        script = place / name
        script.write_text(_WRAPPER.format(prefix=alias, program=program))
        script.chmod(0o755)
    return place
