"""Views between framework tensors and NumPy arrays.

Only frameworks that the user's script has already imported are looked at: a torch tensor
cannot exist before torch is imported.
"""

import sys
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hpc_dl.arrays.dtypes import BFLOAT16
from hpc_dl.errors import UnsupportedError

Array = NDArray[Any]


def _is_torch(x: object) -> bool:
    torch = sys.modules.get("torch")
    return torch is not None and isinstance(x, torch.Tensor)


def _is_tensorflow(x: object) -> bool:
    tf = sys.modules.get("tensorflow")
    return tf is not None and isinstance(x, tf.Tensor | tf.Variable)


def is_device_tensor(x: object) -> bool:
    """Tell whether ``x`` is a tensor in the memory of an accelerator.

    TensorFlow's tensors are not counted: its runtime copies them to the host on demand.
    """
    return _is_torch(x) and x.device.type != "cpu"  # type: ignore[attr-defined]


def host_view(x: Any) -> Array:
    """View a tensor as a NumPy array of the same shape.

    Args:
        x: a NumPy array, a dense torch CPU tensor, an eager TensorFlow tensor or variable,
            a Keras variable, or anything that ``numpy.asarray`` takes.

    Returns:
        The same memory where the framework allows it (NumPy, torch, eager TensorFlow
        tensors; the last is read-only), else a copy.

    Raises:
        UnsupportedError: a sparse tensor, one in the memory of an accelerator, or one of
            a type that NumPy does not have.
    """
    if isinstance(x, np.ndarray):
        return x
    if _is_torch(x):
        return _torch_to_host(x)
    keras = sys.modules.get("keras")
    if keras is not None and isinstance(x, keras.Variable):
        return host_view(x.value)
    if _is_tensorflow(x):
        if not hasattr(x, "numpy"):
            raise UnsupportedError(
                f"{x!r} is symbolic: it has no value outside the graph. Call the function of "
                "hpc_dl.tensorflow with the same name inside the tf.function"
            )
        x = x.numpy()
    array: Array = np.asarray(x)
    return array


def _torch_to_host(x: Any) -> Array:
    torch = sys.modules["torch"]
    if x.layout is not torch.strided:
        raise UnsupportedError(f"got a {x.layout} tensor; pass x.to_dense()")
    if is_device_tensor(x):
        raise UnsupportedError(f"got a tensor on {x.device}; pass x.cpu()")
    if x.is_conj() or x.is_neg():
        raise UnsupportedError("got a lazy conjugate; pass x.resolve_conj().resolve_neg()")
    x = x.detach()
    if x.dtype is torch.bfloat16:
        return np.asarray(x.view(torch.int16).numpy()).view(BFLOAT16)
    try:
        return np.asarray(x.numpy())
    except TypeError:
        raise UnsupportedError(f"NumPy has no {x.dtype}; pass x.float() or x.half()") from None


def torch_view(x: Array) -> Any:
    """View a NumPy array as a torch CPU tensor of the same shape and memory (if writable)."""
    torch = sys.modules["torch"]
    if not x.flags.writeable:
        x = x.copy()  # torch has no read-only tensors
    if x.dtype == BFLOAT16:
        return torch.from_numpy(x.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(x)


def from_host(array: Array, like: Any) -> Any:
    """Make a tensor of ``like``'s framework, on its device, from a NumPy array.

    The result may share the array's memory; give away the array.
    """
    if _is_torch(like):
        return torch_view(array).to(like.device)
    keras = sys.modules.get("keras")
    if keras is not None and isinstance(like, keras.Variable):
        like = like.value
        if _is_torch(like):
            return from_host(array, like)
    if _is_tensorflow(like):
        return sys.modules["tensorflow"].convert_to_tensor(array)
    return array
