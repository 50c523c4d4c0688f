"""Data-parallel TensorFlow with Horovod's names.

import hpc_dl.tensorflow as hvd

hvd.init()
tape = hvd.DistributedGradientTape(tape)
hvd.broadcast_variables(model.variables, root_rank=0)

Keras models are served by ``hpc_dl.keras``; its optimizer and its layer are named here too,
and import Keras only when they are used.
"""

import importlib
from functools import partial
from typing import Any

from hpc_dl.tensorflow.allreduce import allreduce, grouped_allreduce
from hpc_dl.tensorflow.collectives import (
    allgather,
    alltoall,
    barrier,
    broadcast,
    grouped_allgather,
    grouped_reducescatter,
    join,
    reducescatter,
)
from hpc_dl.tensorflow.compression import Compression, Compressor
from hpc_dl.tensorflow.functions import (
    BroadcastGlobalVariablesHook,
    allgather_object,
    broadcast_,
    broadcast_global_variables,
    broadcast_object,
    broadcast_object_fn,
    broadcast_variables,
)
from hpc_dl.tensorflow.optimizer import DistributedOptimizer
from hpc_dl.tensorflow.queries import (
    local_rank_op,
    local_size_op,
    process_set_included_op,
    rank_op,
    size_op,
)
from hpc_dl.tensorflow.tape import DistributedGradientTape, PartialDistributedGradientTape
from hpc_dl.world import (
    Adasum,
    Average,
    Max,
    Min,
    ProcessSet,
    Product,
    Sum,
    add_process_set,
    ccl_built,
    cross_rank,
    cross_size,
    cuda_built,
    ddl_built,
    global_process_set,
    gloo_built,
    gloo_enabled,
    init_framework,
    is_homogeneous,
    is_initialized,
    local_rank,
    local_size,
    mpi_built,
    mpi_enabled,
    mpi_threads_supported,
    nccl_built,
    rank,
    remove_process_set,
    rocm_built,
    shutdown,
    size,
)

init = partial(init_framework, framework="tensorflow")

#: Names of the Keras adapter that Horovod has here too.
_FROM_KERAS = ("SyncBatchNormalization",)


def __getattr__(name: str) -> Any:
    if name in _FROM_KERAS:
        return getattr(importlib.import_module("hpc_dl.keras"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


__all__ = [
    "Adasum",
    "Average",
    "BroadcastGlobalVariablesHook",
    "Compression",
    "Compressor",
    "DistributedGradientTape",
    "DistributedOptimizer",
    "Max",
    "Min",
    "PartialDistributedGradientTape",
    "ProcessSet",
    "Product",
    "Sum",
    "SyncBatchNormalization",
    "add_process_set",
    "allgather",
    "allgather_object",
    "allreduce",
    "alltoall",
    "barrier",
    "broadcast",
    "broadcast_",
    "broadcast_global_variables",
    "broadcast_object",
    "broadcast_object_fn",
    "broadcast_variables",
    "ccl_built",
    "cross_rank",
    "cross_size",
    "cuda_built",
    "ddl_built",
    "global_process_set",
    "gloo_built",
    "gloo_enabled",
    "grouped_allgather",
    "grouped_allreduce",
    "grouped_reducescatter",
    "init",
    "is_homogeneous",
    "is_initialized",
    "join",
    "local_rank",
    "local_rank_op",
    "local_size",
    "local_size_op",
    "mpi_built",
    "mpi_enabled",
    "mpi_threads_supported",
    "nccl_built",
    "process_set_included_op",
    "rank",
    "rank_op",
    "reducescatter",
    "remove_process_set",
    "rocm_built",
    "shutdown",
    "size",
    "size_op",
]
