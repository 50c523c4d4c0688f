"""Casts of gradients for the wire, with Horovod's interface.

A compressor is a class with ``compress(tensor) -> (tensor, context)`` and
``decompress(tensor, context) -> tensor``.
"""

from typing import Any, ClassVar

import tensorflow as tf

from hpc_dl.compress import Policy
from hpc_dl.errors import OptionError
from hpc_dl.world.gradients import gradient_compression


class Compressor:
    """The interface; subclass it for a compressor of your own."""

    #: The type on the wire of floating-point tensors, if the compressor is a plain cast.
    wire_dtype: ClassVar[Any] = None

    @classmethod
    def compress(cls, tensor: Any) -> tuple[Any, Any]:
        """Return what is sent, and what ``decompress`` needs to know."""
        if cls.wire_dtype is None or not tensor.dtype.is_floating:
            return tensor, tensor.dtype
        return tf.cast(tensor, cls.wire_dtype), tensor.dtype

    @classmethod
    def decompress(cls, tensor: Any, ctx: Any) -> Any:
        """Return the tensor in its own type."""
        return tf.cast(tensor, ctx)


class NoneCompressor(Compressor):
    """Send gradients as they are."""


class FP16Compressor(Compressor):
    """Send float16: half the bytes, 11 bits of precision, up to 65504."""

    wire_dtype = tf.float16


class BF16Compressor(Compressor):
    """Send bfloat16: half the bytes, 8 bits of precision, the range of float32."""

    wire_dtype = tf.bfloat16


class Compression:
    """The compressors by name."""

    none = NoneCompressor
    fp16 = FP16Compressor
    bf16 = BF16Compressor


def resolve(compression: Any) -> Any:
    """Accept a compressor or the name of one.

    Raises:
        OptionError: neither; the message lists the names.
    """
    if isinstance(compression, str):
        found = {"none": NoneCompressor, "fp16": FP16Compressor, "bf16": BF16Compressor}
        if compression not in found:
            raise OptionError.unknown("compression", compression, found)
        return found[compression]
    if not (hasattr(compression, "compress") and hasattr(compression, "decompress")):
        raise OptionError(
            f"compression={compression!r}: give Compression.none, .fp16 or .bf16, or a class with "
            "compress(tensor) and decompress(tensor, ctx)"
        )
    return compression


#: The casts by name.
CASTS = {"none": NoneCompressor, "fp16": FP16Compressor, "bf16": BF16Compressor}


def of_gradients(compression: Any) -> Any:
    """Read what the user gives an optimizer or a tape as ``compression``.

    Returns:
        A ``Policy``, or a class of the user's own with Horovod's interface.

    Raises:
        OptionError: neither; the message lists the names.
    """
    return gradient_compression(compression, {kind: name for name, kind in CASTS.items()})


def in_graph(compression: Any) -> Any:
    """Return the class that casts in the graph what ``of_gradients`` returned.

    Compressors that do more work on the host, and nothing is cast before.
    """
    if isinstance(compression, Policy):
        return CASTS.get(compression.cast or "none")
    return compression
