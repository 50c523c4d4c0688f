"""Keep the model with the best metric."""

from typing import Any

import keras

from hpc_dl.errors import OptionError
from hpc_dl.keras.callbacks.metrics import average
from hpc_dl.world import broadcast_object, rank


class BestModelCheckpoint(keras.callbacks.ModelCheckpoint):
    """Save, on rank 0, the model whose metric, averaged over the ranks, is the best so far."""

    def __init__(
        self,
        monitor: str = "val_loss",
        verbose: int = 0,
        save_weights_only: bool = False,
        mode: str = "auto",
        save_freq: str = "epoch",
        filepath: str | None = None,
    ):
        """Make the callback.

        Args:
            monitor: the metric.
            verbose: 1 prints a line when the model is saved.
            save_weights_only: save the weights alone.
            mode: ``min``, ``max``, or ``auto``: by the name of the metric.
            save_freq: ``epoch``: metrics are averaged at the end of epochs.
            filepath: by default ``best_model.keras``, or ``best_model.weights.h5``.
        """
        if save_freq != "epoch":
            raise OptionError(
                f"save_freq={save_freq!r}; valid: 'epoch', at the end of which metrics are averaged"
            )
        default = "best_model.weights.h5" if save_weights_only else "best_model.keras"
        super().__init__(
            default if filepath is None else filepath,
            monitor=monitor,
            verbose=verbose,
            save_best_only=True,
            save_weights_only=save_weights_only,
            mode=mode,
            save_freq="epoch",
        )

    def on_epoch_end(self, epoch: int, logs: dict[str, Any] | None = None) -> None:
        """Average the metric over the ranks, and save on rank 0 if it is the best so far."""
        logs = dict(logs or {})
        logs.update(average(logs, [self.monitor] if self.monitor in logs else []))
        if rank() == 0:
            super().on_epoch_end(epoch, logs)  # which warns where there is no such metric
        self.best: Any = broadcast_object(self.best)
