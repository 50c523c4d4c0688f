"""Average metrics over the ranks."""

import math
from collections.abc import Sequence
from typing import Any

import keras
import numpy as np

from hpc_dl.comm import Op
from hpc_dl.errors import MismatchError
from hpc_dl.keras.callbacks.prepare import ModelCallback
from hpc_dl.world import allgather_object, global_process_set
from hpc_dl.world.collectives import allreduce_now


def average(logs: dict[str, Any], names: Sequence[str]) -> dict[str, Any]:
    """Return the averages over the ranks of the named numbers and arrays.

    All ranks name the same ones, of the same shapes.

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
    values = [np.asarray(keras.ops.convert_to_numpy(logs[name]), np.float64) for name in names]
    flat = np.concatenate([value.reshape(-1) for value in values] or [np.empty(0)])
    allreduce_now(flat, Op.AVERAGE, 1.0, None, global_process_set)
    ends = np.cumsum([value.size for value in values])[:-1]
    averages = np.split(flat, ends) if values else []
    return {
        name: average.reshape(value.shape) if value.ndim else float(average[0])
        for name, value, average in zip(names, values, averages, strict=True)
    }


class MetricAverageCallback(ModelCallback):
    """Average all metrics over the ranks at the end of each epoch.

    Put it in front of callbacks that act on metrics (ReduceLROnPlateau, EarlyStopping,
    TensorBoard): with averages all ranks act alike. It also tells the guard of compression the
    loss of each batch.
    """

    def __init__(self, device: str = ""):
        """Make the callback.

        Args:
            device: accepted for Horovod's sake.
        """
        super().__init__()
        self._reported = 0, 0.0

    def on_epoch_begin(self, epoch: int, logs: dict[str, Any] | None = None) -> None:
        """Begin a new mean, as Keras does."""
        self._reported = 0, 0.0

    def on_train_batch_end(self, batch: int, logs: dict[str, Any] | None = None) -> None:
        """Report the loss of this rank; what Keras has is the mean of the epoch so far.

        Args:
            batch: the last one of those that were executed together; there may be fewer in the
                epoch.
        """
        report = getattr(self.model.optimizer, "report_loss", None)
        if report is not None and logs and "loss" in logs:
            before, mean_before = self._reported
            steps = (self.params or {}).get("steps") or batch + 1
            count, mean = min(batch + 1, steps), float(logs["loss"])
            if math.isfinite(mean_before):  # else the mean tells nothing more in this epoch
                report((count * mean - before * mean_before) / (count - before))
            self._reported = count, mean

    def on_epoch_end(self, epoch: int, logs: dict[str, Any] | None = None) -> None:
        """Replace the metrics in ``logs`` by their averages."""
        if logs is not None:
            logs.update(average(logs, sorted(logs)))
