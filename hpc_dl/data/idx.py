"""Read IDX files, the format of MNIST and its relatives, plain or compressed with gzip.

Format: two zero bytes, one byte for the type, one for the number of dimensions, each dimension
as a big-endian uint32, then the values, big-endian (LeCun, Cortes, Burges,
"The MNIST database of handwritten digits").
"""

import gzip
import math
import os
import struct
import zlib
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from hpc_dl.errors import DataError

_TYPES = {0x08: ">u1", 0x09: ">i1", 0x0B: ">i2", 0x0C: ">i4", 0x0D: ">f4", 0x0E: ">f8"}
_GZIP = b"\x1f\x8b"


def read_idx(path: str | os.PathLike[str]) -> NDArray[np.generic]:
    """Read an IDX file into an array in native byte order.

    Raises:
        DataError: it cannot be read, is no IDX file, or is not as long as its header says.
    """
    content = _content(Path(path))
    if len(content) < 4:
        raise DataError(f"{path}: {len(content)} bytes; an IDX file begins with 4. Fetch it anew")
    zeros, code, dimensions = struct.unpack_from(">HBB", content)
    if zeros != 0 or code not in _TYPES:
        known = ", ".join(f"0000{code:02x}" for code in _TYPES)
        raise DataError(
            f"{path}: begins with {content[:4].hex()}, so it is no IDX file; one begins with "
            f"one of {known} and the number of dimensions"
        )
    start = 4 + 4 * dimensions
    if len(content) < start:
        raise DataError(f"{path}: ends within its header of {start} bytes. Fetch it anew")
    shape = struct.unpack_from(f">{dimensions}I", content, 4)
    dtype = np.dtype(_TYPES[code])
    expected = start + math.prod(shape) * dtype.itemsize
    if len(content) != expected:
        state = "truncated" if len(content) < expected else "too long"
        raise DataError(
            f"{path}: {state}: {len(content)} bytes, but its header says shape {shape} of "
            f"{dtype.name}, which is {expected} bytes. Fetch it anew"
        )
    array = np.frombuffer(content, dtype, offset=start).reshape(shape)
    return array.astype(dtype.newbyteorder("="))


def _content(path: Path) -> bytes:
    try:
        content = path.read_bytes()
        return gzip.decompress(content) if content.startswith(_GZIP) else content
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise DataError(f"{path}: damaged gzip file ({error}). Fetch it anew") from error
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror})") from error
