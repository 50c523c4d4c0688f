"""Change the learning rate between or within epochs, and warm it up.

Goyal et al., "Accurate, Large Minibatch SGD: Training ImageNet in 1 Hour", 2017: section 2.2
for the warm-up, section 3 for the correction of momentum.
"""

import math
from collections.abc import Callable
from typing import Any

from hpc_dl.errors import OptionError
from hpc_dl.keras.backend import to_numpy
from hpc_dl.keras.callbacks.prepare import ModelCallback
from hpc_dl.world import rank, size

#: Where Keras' optimizers with the option ``momentum`` keep velocities that contain the
#: learning rate.
_VELOCITIES = ("momentums", "_momentums")


class LearningRateScheduleCallback(ModelCallback):
    """Set the learning rate to ``initial_lr * multiplier(epoch)`` in a range of epochs."""

    def __init__(
        self,
        initial_lr: float,
        multiplier: float | Callable[[float], float],
        start_epoch: int = 0,
        end_epoch: int | None = None,
        staircase: bool = True,
        momentum_correction: bool = True,
        steps_per_epoch: int | None = None,
    ):
        """Make the callback.

        Args:
            initial_lr: what is multiplied.
            multiplier: a function of the epoch, or a number ``m`` that stands for
                ``m ** (epoch - start_epoch)``.
            start_epoch: the first epoch in which it acts.
            end_epoch: the first epoch in which it no longer acts; None: it always does.
            staircase: act at the beginning of epochs; otherwise of batches, where the
                multiplier gets ``epoch + batch / steps_per_epoch``.
            momentum_correction: scale the velocities of optimizers with momentum along.
            steps_per_epoch: the batches of an epoch; by default Keras is asked.
        """
        super().__init__()
        if initial_lr is None:
            raise OptionError("initial_lr is required: the learning rate that is multiplied")
        self.initial_lr, self.staircase = initial_lr, staircase
        self.start_epoch, self.end_epoch = start_epoch, end_epoch
        self.momentum_correction, self.steps_per_epoch = momentum_correction, steps_per_epoch
        self.multiplier: Callable[[float], float]
        if callable(multiplier):
            self.multiplier = multiplier
        else:
            base = float(multiplier)
            self.multiplier = lambda epoch: base ** (epoch - start_epoch)
        self._epoch = 0

    def on_train_begin(self, logs: Any = None) -> None:
        """Find out how many batches an epoch has."""
        if not self.staircase and not self.steps_per_epoch:
            steps = (self.params or {}).get("steps")
            if not steps:
                raise OptionError(
                    "Keras does not know how many batches an epoch of this data set has; pass "
                    f"steps_per_epoch to {type(self).__name__}, or to model.fit()"
                )
            self.steps_per_epoch = int(steps)

    def on_epoch_begin(self, epoch: int, logs: Any = None) -> None:
        """Note the epoch."""
        self._epoch = epoch

    def on_train_batch_begin(self, batch: int, logs: Any = None) -> None:
        """Set the learning rate if it is due."""
        if self._epoch < self.start_epoch:
            return
        if self.end_epoch is not None and self._epoch >= self.end_epoch:
            return
        if self.staircase and batch == 0:
            self._set(self.initial_lr * self.multiplier(self._epoch))
        elif not self.staircase:
            assert self.steps_per_epoch is not None
            epoch = self._epoch + batch / self.steps_per_epoch
            self._set(self.initial_lr * self.multiplier(epoch))

    def on_epoch_end(self, epoch: int, logs: dict[str, Any] | None = None) -> None:
        """Put the learning rate into the logs, as ``lr``."""
        if logs is not None:
            logs["lr"] = self._get()

    def _get(self) -> float:
        return float(to_numpy(self.model.optimizer.learning_rate))

    def _set(self, new: float) -> None:
        optimizer, old = self.model.optimizer, self._get()
        try:
            optimizer.learning_rate = new
        except TypeError as error:
            raise OptionError(
                "the optimizer was made with a LearningRateSchedule, which this callback cannot "
                "change; make it with a number, or leave the callback out"
            ) from error
        if self.momentum_correction and old > 0 and new != old:
            _scale_velocities(optimizer, new / old)


def _scale_velocities(optimizer: Any, ratio: float) -> None:
    """Make velocities what they would be had the learning rate always been the new one."""
    optimizer = getattr(optimizer, "inner_optimizer", optimizer)
    if not getattr(optimizer, "momentum", 0):
        return
    for attribute in _VELOCITIES:
        for velocity in getattr(optimizer, attribute, None) or ():
            if velocity is not None:
                velocity.assign(velocity * ratio)


class LearningRateWarmupCallback(LearningRateScheduleCallback):
    """Raise the learning rate from ``initial_lr / size`` to ``initial_lr``, batch by batch.

    In epoch ``e`` (a fraction, counted at the end of each batch) of ``warmup_epochs`` it is
    ``initial_lr / size * (1 + e * (size - 1) / warmup_epochs)``. With several
    ``steps_per_execution`` it rises from one execution to the next.
    """

    def __init__(
        self,
        initial_lr: float,
        warmup_epochs: float = 5,
        momentum_correction: bool = True,
        steps_per_epoch: int | None = None,
        verbose: int = 0,
    ):
        """Make the callback.

        Args:
            initial_lr: the learning rate for all ranks together: that of one rank times
                the number of ranks.
            warmup_epochs: after so many, perhaps with a fraction, it is reached; 0: at once.
            momentum_correction: scale the velocities of optimizers with momentum along.
            steps_per_epoch: the batches of an epoch; by default Keras is asked.
            verbose: 1 prints a line on rank 0 at the end.
        """
        if not 0 <= warmup_epochs < math.inf:
            raise OptionError(f"warmup_epochs={warmup_epochs}; give a number of epochs, 0 or more")

        def multiplier(epoch: float) -> float:
            assert self.steps_per_epoch is not None
            done = min(epoch + 1.0 / self.steps_per_epoch, warmup_epochs)
            return (1.0 + done * (size() - 1) / warmup_epochs) / size()

        super().__init__(
            initial_lr,
            multiplier,
            end_epoch=math.ceil(warmup_epochs),
            staircase=False,
            momentum_correction=momentum_correction,
            steps_per_epoch=steps_per_epoch,
        )
        self.verbose = verbose

    def on_epoch_end(self, epoch: int, logs: dict[str, Any] | None = None) -> None:
        """Put the learning rate into the logs, and say so when it is reached."""
        if self.end_epoch == epoch + 1:
            self._set(self.initial_lr)  # the last execution began below it
        super().on_epoch_end(epoch, logs)
        if self.verbose and self.end_epoch == epoch + 1 and rank() == 0:
            print(f"\nEpoch {epoch + 1}: finished gradual learning rate warmup to {self._get():g}.")
