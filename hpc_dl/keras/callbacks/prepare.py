"""Make a compiled model fit for distributed training, where Keras decided otherwise."""

import logging
from typing import Any

import keras

from hpc_dl.keras import backend
from hpc_dl.keras.optimizer import is_distributed
from hpc_dl.world import rank, size

log = logging.getLogger("hpc_dl")


class ModelCallback(keras.callbacks.Callback):
    """A callback that prepares the model before ``fit`` builds its training function."""

    def set_model(self, model: Any) -> None:
        """Take the model that will be trained."""
        super().set_model(model)
        prepare(model)


def prepare(model: Any) -> None:
    """Undo two choices of ``model.compile()`` that a distributed optimizer cannot live with.

    Under the policy mixed_float16 Keras puts the optimizer into a LossScaleOptimizer, which
    must be the distributed one; on GPUs it compiles with XLA, which cannot hold collectives.
    """
    outer = getattr(model, "optimizer", None)
    inner: Any = getattr(outer, "inner_optimizer", None)
    if is_distributed(inner):
        inner.distribution.move_to(outer)
    if outer is not None and size() > 1 and rank() == 0 and not is_distributed(model.optimizer):
        log.warning(
            "the optimizer of model %r is not distributed, so each rank trains by itself, unless "
            "a DistributedGradientTape combines the gradients. Wrap it in DistributedOptimizer; "
            "load a saved model with hpc_dl.keras.load_model",
            model.name,
        )
    if backend.NAME != "tensorflow" or not is_distributed(model.optimizer) or size() == 1:
        return
    if model.jit_compile:
        model.jit_compile = False
        if rank() == 0:
            log.info("XLA is off for model %r: it cannot compile the reduction", model.name)
