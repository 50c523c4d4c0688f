"""Cut a rank's samples into batches."""

from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np

from hpc_dl.data.images import Batch, Images, Indices
from hpc_dl.errors import OptionError


def batches(
    source: Images, indices: Indices, batch_size: int, epoch: int = 0, ahead: int = 0
) -> Iterator[Batch]:
    """Yield batches of the given samples in their order; the last may be smaller.

    Args:
        source: where the images come from.
        indices: the samples, for example from `shard_indices`.
        batch_size: images in a batch.
        epoch: for a source that alters images at random.
        ahead: batches to prepare on another thread while one is in use; 0: none, which is best
            for images in memory.

    Raises:
        OptionError: ``batch_size`` below 1 or ``ahead`` below 0.
    """
    if batch_size < 1 or ahead < 0:
        raise OptionError(
            f"batches(batch_size={batch_size}, ahead={ahead}): give a batch_size of 1 or more "
            "and 0 or more ahead"
        )
    parts = np.split(indices, range(batch_size, len(indices), batch_size)) if len(indices) else []
    if not ahead:
        return (source.batch(part, epoch) for part in parts)
    return _prepared(source, parts, epoch, ahead)


def _prepared(source: Images, parts: list[Indices], epoch: int, ahead: int) -> Iterator[Batch]:
    coming: deque[Future[Batch]] = deque()
    with ThreadPoolExecutor(1, thread_name_prefix="batches") as thread:
        try:
            for part in parts:
                coming.append(thread.submit(source.batch, part, epoch))
                if len(coming) > ahead:
                    yield coming.popleft().result()
            while coming:
                yield coming.popleft().result()
        finally:
            for future in coming:
                future.cancel()
