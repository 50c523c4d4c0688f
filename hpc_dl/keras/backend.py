"""What differs between the backends of Keras."""

import contextlib
import importlib
from collections.abc import Callable, Sequence
from typing import Any

import keras

from hpc_dl.errors import UnsupportedError
from hpc_dl.world import Group
from hpc_dl.world.gradients import Gradient, GradientOptions
from hpc_dl.world.replicas import ReplicaWatch

#: The backends that are served; each is the name of an adapter too.
SERVED = ("tensorflow", "torch")

#: Combines a step's gradients over the ranks.
Reduction = Callable[[Sequence[Gradient], ReplicaWatch], list[Any]]


def _find() -> str:
    name = str(keras.config.backend())
    if name not in SERVED:
        raise UnsupportedError(
            f"hpc_dl.keras serves the Keras backends {' and '.join(SERVED)}; this is {name!r}. "
            f"Set KERAS_BACKEND={SERVED[0]} (or {SERVED[1]}) before Keras is imported"
        )
    return name


#: The backend of this process: Keras fixes it when it is imported.
NAME = _find()

#: The adapter of this backend.
adapter: Any = importlib.import_module(f"hpc_dl.{NAME}")


def reduction(group: Group, options: GradientOptions, label: str) -> Any:
    """Make what combines gradients of this backend."""
    if NAME == "torch":
        from hpc_dl.keras.on_torch import GradientReduction

        return GradientReduction(group, options, label)
    from hpc_dl.tensorflow.gradients import GradientReduction as OnTensorFlow

    return OnTensorFlow(group, options, label)


def compressor(compression: Any) -> Any:
    """Read what the user gives as ``compression`` of gradients."""
    return importlib.import_module(f"hpc_dl.{NAME}.compression").of_gradients(compression)


def is_sparse(gradient: Any) -> bool:
    """Tell whether a gradient holds some rows only."""
    if NAME == "torch":
        return bool(gradient is not None and gradient.is_sparse)
    import tensorflow as tf

    return isinstance(gradient, tf.IndexedSlices)


def dense(gradient: Any) -> Any:
    """Return a gradient as a dense tensor."""
    if NAME == "torch":
        return gradient.to_dense() if gradient.is_sparse else gradient
    import tensorflow as tf

    return tf.convert_to_tensor(gradient)


def to_numpy(x: Any) -> Any:
    """Return the value of a variable or a tensor as an array."""
    # Of what is inside a Keras variable: asking the variable itself makes NumPy 2 warn.
    native = x.value if isinstance(x, keras.Variable) else x
    return keras.ops.convert_to_numpy(native) if NAME == "torch" else native.numpy()


def outside_graph() -> contextlib.AbstractContextManager[Any]:
    """Leave the graph that is being traced, if any, to make variables."""
    if NAME == "torch":
        return contextlib.nullcontext()
    import tensorflow as tf

    scope: contextlib.AbstractContextManager[Any] = tf.init_scope()
    return scope


def as_written(function: Callable[..., Any]) -> Callable[..., Any]:
    """Keep AutoGraph from rewriting ``function``, which decides nothing on tensors."""
    if NAME == "torch":
        return function
    from hpc_dl.tensorflow.host import as_written as on_tensorflow

    return on_tensorflow(function)


def is_traced() -> bool:
    """Tell whether a graph is being traced: what Python does now happens once."""
    if NAME == "torch":
        return False
    import tensorflow as tf

    return not tf.executing_eagerly()
