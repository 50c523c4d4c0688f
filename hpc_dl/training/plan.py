"""How long to train and on which batches, and what came of it."""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

from hpc_dl.data import Batch, Images, batches, shard_indices
from hpc_dl.errors import OptionError


class Outcome(NamedTuple):
    """What a training ends with."""

    test_loss: float | None
    """The mean over all test images; None: there were none."""
    test_accuracy: float | None
    bytes_sent: int
    """Bytes of gradients that this rank put on the wire."""
    bytes_dense: int
    """Bytes that it would have put there without compression."""
    weights_digest: str
    """See `hpc_dl.observe.weights_digest`."""


@dataclass(frozen=True, eq=False)
class Plan:
    """The batches of one rank; all ranks have equally many, of equal sizes.

    Args:
        train: the images to learn from.
        test: others to be tested on after each epoch, or None.
        rank: this rank.
        size: the number of ranks.
        epochs: how many times to go through ``train``.
        batch_size: images in a batch, on each rank; the last of an epoch may have fewer.
        seed: the number that the order of the images derives from.
        most_steps: end each epoch after so many batches; None: at its end.
        ahead: batches to prepare on another thread.
    """

    train: Images
    test: Images | None
    rank: int
    size: int
    epochs: int
    batch_size: int
    seed: int
    most_steps: int | None = None
    ahead: int = 0

    def __post_init__(self) -> None:
        if len(self.train) < self.size:
            raise OptionError(
                f"{len(self.train)} images cannot be shared by {self.size} ranks; use fewer "
                "ranks, or more images"
            )

    @property
    def steps(self) -> int:
        """The number of batches that each rank has in an epoch."""
        all_steps = math.ceil(len(self.train) // self.size / self.batch_size)
        return all_steps if self.most_steps is None else min(all_steps, self.most_steps)

    def images_in(self, step: int) -> int:
        """Return how many images the ranks have together in a step (from 0) of an epoch."""
        left = len(self.train) // self.size - step * self.batch_size
        return min(self.batch_size, left) * self.size

    def training_batches(self, epoch: int) -> Iterator[Batch]:
        """Yield this rank's batches of an epoch (from 0)."""
        mine = shard_indices(
            len(self.train), self.rank, self.size, epoch, self.seed, remainder="drop"
        )[: self.steps * self.batch_size]
        return batches(self.train, mine, self.batch_size, epoch, self.ahead)

    def all_training_batches(self) -> Iterator[Batch]:
        """Yield this rank's batches of all epochs, one after the other."""
        for epoch in range(self.epochs):
            yield from self.training_batches(epoch)

    def test_batches(self) -> Iterator[Batch]:
        """Yield this rank's part of the test images; over all ranks each comes exactly once."""
        if self.test is None:
            return iter(())
        mine = shard_indices(len(self.test), self.rank, self.size, shuffle=False)
        return batches(self.test, mine, self.batch_size, ahead=self.ahead)
