"""Load models so that they go on training on all ranks."""

from collections.abc import Mapping, Sequence
from typing import Any

import keras

from hpc_dl.keras.backend import adapter
from hpc_dl.keras.optimizer import DistributedOptimizer


def load_model(
    filepath: Any,
    custom_optimizers: Sequence[type] | None = None,
    custom_objects: Mapping[str, Any] | None = None,
    compression: Any = adapter.Compression.none,
    legacy_opts: bool = False,
) -> Any:
    """Load a model that Keras saved, and make its optimizer distributed; its state is kept.

    Args:
        filepath: of a ``.keras`` or ``.h5`` file, whoever saved it.
        custom_optimizers: classes of optimizers that Keras does not know.
        custom_objects: other classes and functions that Keras does not know, by name.
        compression: of the gradients; see ``DistributedOptimizer``.
        legacy_opts: accepted for Horovod's sake; Keras 3 has no legacy optimizers.
    """
    known = {kind.__name__: kind for kind in custom_optimizers or ()}
    model = keras.models.load_model(filepath, custom_objects={**known, **(custom_objects or {})})
    if getattr(model, "optimizer", None) is not None:
        DistributedOptimizer(model.optimizer, compression=compression)
    return model
