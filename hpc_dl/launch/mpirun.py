"""Find the program that starts ranks, tell which MPI it belongs to, and speak its options."""

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from hpc_dl.errors import LaunchError, MissingComponentError

Family = Literal["openmpi", "hydra"]

#: Names the program to use when no ``--mpirun`` is given.
VARIABLE = "HPC_DL_MPIRUN"

REMEDY = (
    "install one with `pip install 'hpc_dl[mpi]'` (nothing to compile), load the MPI module of "
    f"your site, or name the program with --mpirun or {VARIABLE}"
)

#: What a running rank hands to its children; a new job started there must not inherit it.
_RUNTIME_PREFIXES = (
    *("OMPI_COMM_WORLD_", "OMPI_UNIVERSE_", "OMPI_FILE_", "PMIX_", "PMI_", "HYDI_"),
    *("HPC_DL_LAUNCH_", "HPC_DL_EXPECTED_SIZE"),
)
_KEPT_PREFIXES = ("PMIX_MCA_",)


@dataclass(frozen=True)
class Mpirun:
    """A program that starts ranks.

    Args:
        path: the program.
        family: whose options it takes: Open MPI's, or Hydra's (MPICH, Intel MPI, MVAPICH).
        version: the first line of its ``--version``.
        source: where it was found, for messages.
    """

    path: Path
    family: Family
    version: str
    source: str

    @property
    def bin_directory(self) -> Path:
        """The folder where the compiler wrappers of the same MPI lie."""
        return self.path.parent


def find_mpirun(given: str | None = None, environ: Mapping[str, str] | None = None) -> Mpirun:
    """Find mpirun: the one given, ``$HPC_DL_MPIRUN``, this environment's, then the PATH's.

    Raises:
        MissingComponentError: there is none, or the one that was named does not exist.
        LaunchError: it does not say what it is.
    """
    environ = os.environ if environ is None else environ
    for path, source in _candidates(given, environ):
        return _identify(path, source)
    raise MissingComponentError(
        f"no mpirun was found next to {sys.executable} or on PATH; {REMEDY}"
    )


def _candidates(given: str | None, environ: Mapping[str, str]) -> Iterator[tuple[Path, str]]:
    named = ((given, "--mpirun"), (environ.get(VARIABLE), f"${VARIABLE}"))
    for name, source in named:
        if name:
            found = shutil.which(name, path=environ.get("PATH"))
            if found is None:
                raise MissingComponentError(
                    f"{source} names {name!r}, which is no program; {REMEDY}"
                )
            yield Path(found).absolute(), source
            return
    for name in ("mpirun", "mpiexec"):
        beside = Path(sys.executable).parent / name
        if os.access(beside, os.X_OK):
            yield beside, "this Python environment"
    for name in ("mpirun", "mpiexec"):
        found = shutil.which(name, path=environ.get("PATH"))
        if found is not None:
            yield Path(found).absolute(), "PATH"


def _identify(path: Path, source: str) -> Mpirun:
    try:
        answer = subprocess.run(
            [os.fspath(path), "--version"],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=30,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise LaunchError(f"`{path} --version` failed: {error}; {REMEDY}") from error
    text = answer.stdout + answer.stderr
    family = family_of(text)
    if family is None:
        raise LaunchError(
            f"`{path} --version` names neither Open MPI nor MPICH / Hydra "
            f"(it says: {text.strip()[:200]!r}); {REMEDY}"
        )
    version = next(line.strip() for line in text.splitlines() if line.strip())
    return Mpirun(path, family, _hydra_version(text) or version, source)


def family_of(version_text: str) -> Family | None:
    """Tell whose mpirun prints this ``--version``; None for an unknown one.

    >>> family_of("mpirun (Open MPI) 5.0.11")
    'openmpi'
    """
    text = version_text.lower()
    if any(mark in text for mark in ("open mpi", "open-rte", "openrte", "prte")):
        return "openmpi"
    if any(mark in text for mark in ("hydra", "mpich", "intel(r) mpi", "mvapich")):
        return "hydra"
    return None


def _hydra_version(text: str) -> str | None:
    for line in text.splitlines():
        name, _, value = line.partition(":")
        if name.strip() == "Version" and value.strip():
            return f"Hydra {value.strip()}"
    return None


def start_options(
    mpirun: Mpirun, ranks: int, exported: tuple[str, ...], given: Sequence[str] = ()
) -> list[str]:
    """Return the options that start ``ranks`` ranks on this machine, whatever its number of cores.

    Args:
        mpirun: the program.
        ranks: how many ranks.
        exported: names of the environment variables that every rank must see.
        given: the user's own options, which come after these; both MPIs refuse an option twice.
    """
    theirs = {"-" + word.partition("=")[0].lstrip("-") for word in given if word[:1] == "-"}
    options = ["-n", str(ranks)]
    # In a batch allocation mpirun would spread the ranks over all of its nodes.
    if not theirs & {"-host", "-hosts", "-H", "-hostfile", "-machinefile", "-f"}:
        options += {
            "openmpi": ["--host", f"localhost:{ranks}"],
            "hydra": ["-hosts", "localhost"],
        }[mpirun.family]
    if mpirun.family == "openmpi":
        # More ranks than cores is normal on a laptop and in a test; binding would then
        # put them all on one core.
        if "-bind-to" not in theirs:
            options += ["--bind-to", "none"]
        if not theirs & {"-map-by", "-oversubscribe", "-nooversubscribe"}:
            options += ["--oversubscribe"]
        for name in exported:
            options += ["-x", name]
    return options


def start_environment(mpirun: Mpirun | None, environ: Mapping[str, str]) -> dict[str, str]:
    """Return the environment in which to start ranks: no outer job's marks, root allowed."""
    clean = {
        name: value
        for name, value in environ.items()
        if not name.startswith(_RUNTIME_PREFIXES) or name.startswith(_KEPT_PREFIXES)
    }
    if mpirun is not None and mpirun.family == "openmpi" and os.geteuid() == 0:
        # Containers run as root; Open MPI refuses that without both.
        clean["OMPI_ALLOW_RUN_AS_ROOT"] = "1"
        clean["OMPI_ALLOW_RUN_AS_ROOT_CONFIRM"] = "1"
    return clean
