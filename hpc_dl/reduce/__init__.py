"""Where gradients meet communicators: fusion buckets, overlap with backward, the guard."""

from hpc_dl.reduce.build import make_reducer
from hpc_dl.reduce.compression import Saved, reshard
from hpc_dl.reduce.guard import ReplicaGuard
from hpc_dl.reduce.reducer import Reducer
from hpc_dl.reduce.traffic import Traffic

__all__ = ["Reducer", "ReplicaGuard", "Saved", "Traffic", "make_reducer", "reshard"]
