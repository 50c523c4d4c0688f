"""Random numbers by key and counter: the same on every machine, in any order of use.

The global generators are never touched. A key is made of (seed, name, step, ...); the n-th
number under a key is a hash of both, so kernels need no state and ranks that share a key
draw alike.
"""

import numpy as np
import xxhash
from numpy.typing import NDArray

#: Steele, Lea, Flood: "Fast splittable pseudorandom number generators", OOPSLA 2014.
GOLDEN = np.uint32(0x9E3779B9)
#: Mueller's multiplier; the functions in ``kernels.draw`` and ``device.codec`` are this one.
MIX = np.uint32(0x45D9F3B)


def key_of(*parts: int | str) -> int:
    """Return a 32-bit key made of all parts.

    >>> key_of(0, "weight", 3) == key_of(0, "weight", 3) != key_of(0, "weight", 4)
    True
    """
    text = "\x1f".join(map(str, parts))
    return int(xxhash.xxh3_64_intdigest(text.encode()) & 0xFFFFFFFF)


def hashed(key: int, counters: NDArray[np.uint32]) -> NDArray[np.uint32]:
    """Return 32 random bits for each counter (Mueller's integer hash of key and counter)."""
    x = counters * GOLDEN + np.uint32(key)
    x ^= x >> np.uint32(16)
    x *= MIX
    x ^= x >> np.uint32(16)
    x *= MIX
    x ^= x >> np.uint32(16)
    return x


def uniform(key: int, count: int, start: int = 0) -> NDArray[np.float32]:
    """Return ``count`` numbers in [0, 1), multiples of 2**-24, from counter ``start`` on."""
    counters = np.arange(start, start + count, dtype=np.uint32)
    bits = hashed(key, counters) >> np.uint32(8)
    return bits.astype(np.float32) * np.float32(2.0**-24)


def generator(*parts: int | str) -> np.random.Generator:
    """Return a generator of its own for this key, for draws outside of hot loops."""
    return np.random.Generator(np.random.Philox(key_of(*parts)))
