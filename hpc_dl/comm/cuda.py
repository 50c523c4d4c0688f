"""What plain MPI does with tensors in the memory of a GPU."""

import ctypes
from enum import StrEnum

from hpc_dl.errors import OptionError


class CudaMode(StrEnum):
    """How CUDA tensors travel over plain MPI."""

    AWARE = "aware"
    STAGE = "stage"
    ERROR = "error"


def mpi_is_cuda_aware() -> bool:
    """Ask the MPI library that is loaded; one that cannot be asked counts as not aware."""
    try:
        query = ctypes.CDLL(None).MPIX_Query_cuda_support
    except AttributeError:
        return False
    query.restype = ctypes.c_int
    return bool(query())


def choose_cuda_mode(text: str) -> CudaMode:
    """Resolve the option ``cuda``.

    Raises:
        OptionError: not one of auto, aware, stage, error.
    """
    if text == "auto":
        return CudaMode.AWARE if mpi_is_cuda_aware() else CudaMode.ERROR
    try:
        return CudaMode(text)
    except ValueError:
        raise OptionError.unknown("value for option cuda", text, ["auto", *CudaMode]) from None
