"""Which samples a rank sees in an epoch."""

from typing import Literal, get_args

import numpy as np
from numpy.typing import NDArray

from hpc_dl.data.streams import Purpose, stream
from hpc_dl.errors import OptionError

#: What happens to the ``n % size`` samples that are over when each rank has as many.
Remainder = Literal["drop", "pad", "uneven"]


def permutation(n: int, seed: int, epoch: int = 0) -> NDArray[np.int64]:
    """Return the order of ``n`` samples in an epoch, the same on every rank and machine."""
    keys = np.asarray(stream(Purpose.ORDER, seed, epoch).random_raw(n), np.uint64)
    return np.argsort(keys, kind="stable").astype(np.int64)


def shard_indices(
    n: int,
    rank: int,
    size: int,
    epoch: int = 0,
    seed: int = 0,
    *,
    remainder: Remainder = "uneven",
    shuffle: bool = True,
) -> NDArray[np.int64]:
    """Return the samples of one rank in one epoch, in the order in which it sees them.

    The ranks deal out one global order like cards, so after the same number of samples on each
    rank they have together seen a prefix of it: the samples of a step do not depend on how
    many ranks share them.

    Args:
        n: the number of samples.
        rank: this rank, from 0.
        size: the number of ranks.
        epoch: the number of the epoch; each has an order of its own.
        seed: the number that all the orders derive from.
        remainder: ``"uneven"``: each sample exactly once, the first ``n % size`` ranks have one
            more; ``"drop"``: equal lengths, ``n % size`` samples are left out of this epoch;
            ``"pad"``: equal lengths, the first samples of the order come a second time.
        shuffle: False: the order 0, 1, 2, ... in every epoch.

    Returns:
        int64 array of ``n // size`` indices, or one more.

    Raises:
        OptionError: a number out of range, or an unknown ``remainder``.

    >>> [shard_indices(5, rank, 2, shuffle=False).tolist() for rank in range(2)]
    [[0, 2, 4], [1, 3]]
    """
    if n < 0 or size < 1 or not 0 <= rank < size:
        raise OptionError(
            f"shard_indices(n={n}, rank={rank}, size={size}): n must be 0 or more, size 1 or "
            "more, rank from 0 to size - 1"
        )
    if remainder not in get_args(Remainder):
        raise OptionError.unknown("remainder", remainder, get_args(Remainder))
    order = permutation(n, seed, epoch) if shuffle else np.arange(n, dtype=np.int64)
    if remainder == "drop":
        order = order[: n - n % size]
    elif remainder == "pad" and n:
        order = np.resize(order, n + -n % size)
    return order[rank::size]
