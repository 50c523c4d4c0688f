"""Variables that each rank trains by itself, and whose gradients are not combined."""

from typing import Any

from hpc_dl.errors import OptionError
from hpc_dl.world.process_sets import ProcessSet


class LocalVariables:
    """A set of variables; frameworks' variables are not hashable, so it goes by identity."""

    def __init__(self, process_set: ProcessSet, scale: bool):
        """Begin with none.

        Args:
            scale: divide local gradients by the number of ranks, as averaging divides the
                others, so that both mean the same loss.
        """
        self._process_set, self._scale = process_set, scale
        self._members: dict[int, Any] = {}

    def add(self, variable: Any) -> None:
        """Make ``variable`` local."""
        self._members[id(native(variable))] = variable

    def __contains__(self, variable: object) -> bool:
        return id(native(variable)) in self._members

    def scaled(self, gradient: Any) -> Any:
        """Return the gradient of a local variable as it is to be applied."""
        if not self._scale or not self._process_set.included():
            return gradient
        size = self._process_set.size()
        if hasattr(gradient, "indices") and hasattr(gradient, "dense_shape"):
            return type(gradient)(gradient.values / size, gradient.indices, gradient.dense_shape)
        return gradient / size


def native(variable: Any) -> Any:
    """Return the framework's variable inside a Keras variable."""
    inner = getattr(variable, "value", None)
    return variable if inner is None or callable(inner) else inner


def local_weights(layer: Any) -> list[Any]:
    """Return the variables of a Keras layer that each rank is to train by itself.

    Raises:
        OptionError: it is no layer, or is not built: its variables do not exist yet.
    """
    if not hasattr(layer, "trainable_weights"):
        raise OptionError(f"local_layers: {layer!r} is no layer; give Keras layers")
    if not layer.built:
        raise OptionError(
            f"local_layers: {layer!r} has no variables yet; build it first, with "
            "layer.build(input_shape) or by calling the model once"
        )
    return list(layer.trainable_weights)
