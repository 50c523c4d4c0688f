"""How many ranks this process was launched with, as launchers say it in the environment."""

import os
from typing import NamedTuple


class Launcher(NamedTuple):
    """A launcher that left its mark, and the number of ranks where it says so."""

    name: str
    size: int | None


#: (variable that marks the launcher, variable with the number of ranks, name)
_MARKS = (
    ("HPC_DL_EXPECTED_SIZE", "HPC_DL_EXPECTED_SIZE", "hpc-dl launch"),
    ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE", "Open MPI's mpirun"),
    ("HOROVOD_RANK", "HOROVOD_SIZE", "horovodrun"),
    ("PMI_RANK", "PMI_SIZE", "mpiexec (PMI)"),
    ("PMIX_RANK", "SLURM_STEP_NUM_TASKS", "a PMIx launcher"),
    ("SLURM_STEP_NUM_TASKS", "SLURM_STEP_NUM_TASKS", "srun"),
)


def find_launcher() -> Launcher | None:
    """Return the launcher of this process, or None if it was started by hand."""
    for mark, size, name in _MARKS:
        if mark in os.environ:
            text = os.environ.get(size, "")
            return Launcher(name, int(text) if text.isdigit() else None)
    return None
