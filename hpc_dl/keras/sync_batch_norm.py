"""Batch normalisation over the batches of all ranks."""

from typing import Any

import keras
from keras import ops

from hpc_dl.comm import Op
from hpc_dl.errors import OptionError
from hpc_dl.keras.backend import adapter
from hpc_dl.world import is_initialized, size


@keras.saving.register_keras_serializable("hpc_dl")
class SyncBatchNormalization(keras.layers.BatchNormalization):
    """Normalise with mean and variance over the batches of all ranks.

    The same weights and arguments as ``keras.layers.BatchNormalization``. Each rank
    contributes its own number of samples, so batches may differ in size. Outside training,
    and with one rank, it does exactly what that layer does.
    """

    def __init__(self, fused: bool = False, **kwargs: Any):
        """Make the layer.

        Args:
            fused: accepted for Horovod's sake; only False is valid.
            kwargs: of ``keras.layers.BatchNormalization``.
        """
        if fused or fused is None:
            raise OptionError(f"fused={fused}; valid: False, as the fused kernel sees one rank")
        super().__init__(**kwargs)

    def _moments(self, inputs: Any, mask: Any) -> tuple[Any, Any]:
        """Return mean and variance by channel over all ranks.

        Two sums, of the values and then of the squared distances from the mean, because the
        difference of large squares would lose the variance in float32.
        """
        if not is_initialized() or size() == 1:
            moments: tuple[Any, Any] = super()._moments(inputs, mask)
            return moments
        axes = [axis for axis in range(len(inputs.shape)) if axis != self.axis % len(inputs.shape)]
        weights = ops.ones_like(inputs)
        if mask is not None:
            weights = weights * ops.cast(ops.expand_dims(mask, -1), inputs.dtype)
        sums = ops.stack([ops.sum(inputs * weights, axes), ops.sum(weights, axes)])
        total, count = ops.unstack(adapter.allreduce(sums, op=Op.SUM))
        count = ops.maximum(count, 1)
        mean = total / count
        shape = [1] * len(inputs.shape)
        shape[self.axis] = -1
        squares = ops.square(inputs - ops.reshape(mean, shape)) * weights
        variance = adapter.allreduce(ops.sum(squares, axes), op=Op.SUM) / count
        return mean, variance
