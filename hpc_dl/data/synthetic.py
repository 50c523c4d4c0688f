"""Images of noise: to measure speed without a data set."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from hpc_dl.data.images import Batch, Indices, Pixels
from hpc_dl.data.streams import Purpose, stream
from hpc_dl.errors import OptionError

#: Different images; more would cost time that is not the network's.
DISTINCT = 64


@dataclass(frozen=True, eq=False)
class SyntheticImages:
    """Endlessly repeated noise; see `synthetic_images`."""

    count: int
    classes: int
    images: Pixels
    labels: NDArray[np.int64]

    def __len__(self) -> int:
        return self.count

    def batch(self, indices: Indices, epoch: int = 0) -> Batch:
        """Return some images."""
        chosen = indices % len(self.labels)
        return Batch(self.images[chosen], self.labels[chosen])


def synthetic_images(
    count: int, size: int, classes: int = 1000, channels: int = 3, seed: int = 0
) -> SyntheticImages:
    """Make ``count`` labelled images, of which 64 differ; a network can learn them by heart.

    Args:
        count: the length of the set.
        size: height and width, in pixels.
        classes: labels run from 0 to ``classes`` - 1.
        channels: 3 for colour.
        seed: the number that the noise derives from.

    Raises:
        OptionError: a number below 1.
    """
    for name, value in (
        ("count", count), ("size", size), ("classes", classes), ("channels", channels)
    ):  # fmt: skip
        if value < 1:
            raise OptionError(f"synthetic_images({name}={value}): give 1 or more")
    generator = np.random.Generator(stream(Purpose.SYNTHETIC, seed))
    distinct = min(count, DISTINCT)
    images = generator.standard_normal((distinct, channels, size, size), np.float32)
    labels = generator.integers(0, classes, distinct, np.int64)
    return SyntheticImages(count, classes, images, labels)
