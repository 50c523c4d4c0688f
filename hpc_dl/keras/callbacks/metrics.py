"""Average metrics over the ranks."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from hpc_dl.comm import Op
from hpc_dl.errors import MismatchError
from hpc_dl.keras.callbacks.prepare import ModelCallback
from hpc_dl.world import allgather_object, global_process_set
from hpc_dl.world.collectives import allreduce_now


def average(logs: dict[str, Any], names: Sequence[str]) -> dict[str, float]:
    """Return the averages over the ranks of the named numbers; all ranks name the same ones.

    Raises:
        MismatchError: on all ranks, if they name different ones.
    """
    everyone = allgather_object(list(names))
    other = next((rank for rank, theirs in enumerate(everyone) if theirs != everyone[0]), None)
    if other is not None:
        raise MismatchError(
            f"ranks have different metrics: {', '.join(everyone[0])} on rank 0, "
            f"{', '.join(everyone[other])} on rank {other}. Compile the same metrics, and "
            "validate, on all ranks"
        )
    values = np.array([float(logs[name]) for name in names])
    allreduce_now(values, Op.AVERAGE, 1.0, None, global_process_set)
    return dict(zip(names, values.tolist(), strict=True))


class MetricAverageCallback(ModelCallback):
    """Average all metrics over the ranks at the end of each epoch.

    Put it in front of callbacks that act on metrics (ReduceLROnPlateau, EarlyStopping,
    TensorBoard): with averages all ranks act alike.
    """

    def __init__(self, device: str = ""):
        """Make the callback.

        Args:
            device: accepted for Horovod's sake.
        """
        super().__init__()

    def on_epoch_end(self, epoch: int, logs: dict[str, Any] | None = None) -> None:
        """Replace the metrics in ``logs`` by their averages."""
        if logs is not None:
            logs.update(average(logs, sorted(name for name in logs if np.ndim(logs[name]) == 0)))
