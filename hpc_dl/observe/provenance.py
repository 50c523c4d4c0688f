"""What a result was made with."""

import os
import platform
import subprocess
import sys
from pathlib import Path

#: Libraries whose version a result may depend on.
LIBRARIES = (
    "hpc_dl", "horovod", "keras", "mpi4py", "numpy", "sklearn", "tensorflow", "torch"
)  # fmt: skip


def versions() -> dict[str, str]:
    """Return the versions of Python and of those libraries that this process has loaded."""
    loaded = {
        name: str(getattr(sys.modules[name], "__version__", "unknown"))
        for name in LIBRARIES
        if name in sys.modules
    }
    return {"python": platform.python_version(), **loaded}


def git_commit(script: str | os.PathLike[str]) -> str | None:
    """Return the commit that ``script`` is part of, or None where git does not track it.

    Returns:
        the hash, with ``-dirty`` at its end if a tracked file is changed.
    """
    path = Path(script).resolve()
    if _git(path.parent, "ls-files", "--error-unmatch", "--", path.name) is None:
        return None
    return _git(path.parent, "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*")


def _git(folder: Path, *arguments: str) -> str | None:
    try:
        done = subprocess.run(
            ["git", "-C", os.fspath(folder), *arguments],
            capture_output=True,
            text=True,
            timeout=10,
            check=True,
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()
