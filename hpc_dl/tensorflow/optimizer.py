"""The optimizer of Horovod's TensorFlow module, whose arguments have an order of their own."""

import importlib
from typing import Any

from hpc_dl.comm import Op
from hpc_dl.errors import OptionError
from hpc_dl.tensorflow.compression import Compression
from hpc_dl.world import ProcessSet, global_process_set


def DistributedOptimizer(  # noqa: N802  (Horovod's name)
    optimizer: Any,
    name: str | None = None,
    use_locking: bool = False,
    device_dense: str = "",
    device_sparse: str = "",
    compression: Any = Compression.none,
    sparse_as_dense: bool = False,
    backward_passes_per_step: int = 1,
    op: Op = Op.AVERAGE,
    gradient_predivide_factor: float = 1.0,
    average_aggregated_gradients: bool = False,
    num_groups: int = 0,
    groups: Any = None,
    process_set: ProcessSet = global_process_set,
    scale_local_gradients: bool = True,
    guard: bool = True,
) -> Any:
    """Make a Keras 3 optimizer apply gradients combined over the ranks; return it.

    The same as ``hpc_dl.keras.DistributedOptimizer``, which says what the arguments mean.

    Args:
        use_locking: of optimizers of TensorFlow 1, which are not served; False.

    Raises:
        OptionError: no Keras 3 optimizer, one that is distributed already, or a bad option.
    """
    if use_locking:
        raise OptionError(
            "use_locking=True is of optimizers of TensorFlow 1, which are not served; valid: False"
        )
    return importlib.import_module("hpc_dl.keras").DistributedOptimizer(
        optimizer,
        name=name,
        device_dense=device_dense,
        device_sparse=device_sparse,
        compression=compression,
        sparse_as_dense=sparse_as_dense,
        gradient_predivide_factor=gradient_predivide_factor,
        op=op,
        backward_passes_per_step=backward_passes_per_step,
        average_aggregated_gradients=average_aggregated_gradients,
        num_groups=num_groups,
        groups=groups,
        process_set=process_set,
        scale_local_gradients=scale_local_gradients,
        guard=guard,
    )
