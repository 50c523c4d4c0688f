"""What all sets of labelled images have in common."""

from dataclasses import dataclass
from typing import NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from hpc_dl.errors import DataError

Indices = NDArray[np.int64]
Pixels = NDArray[np.float32]


class Batch(NamedTuple):
    """Some images and what they show."""

    images: Pixels
    """(batch, channels, height, width), normalised."""
    labels: NDArray[np.int64]
    """(batch,), from 0."""


class Images(Protocol):
    """A set of labelled images that hands them out by number."""

    @property
    def classes(self) -> int:
        """The number of different labels."""

    def __len__(self) -> int:
        """Return the number of images."""

    def batch(self, indices: Indices, epoch: int = 0) -> Batch:
        """Return some images; ``epoch`` counts where they are altered at random."""


@dataclass(frozen=True, eq=False)
class ArrayImages:
    """Images that lie in memory.

    Args:
        images: (n, channels, height, width), normalised.
        labels: (n,), from 0 to ``classes`` - 1.
        classes: the number of different labels.
    """

    images: Pixels
    labels: NDArray[np.int64]
    classes: int

    def __post_init__(self) -> None:
        if self.images.ndim != 4 or self.labels.shape != self.images.shape[:1]:
            raise DataError(
                f"images of shape {self.images.shape} and labels of shape {self.labels.shape}; "
                "give (n, channels, height, width) and (n,)"
            )
        if len(self.labels) and not 0 <= self.labels.min() <= self.labels.max() < self.classes:
            raise DataError(
                f"labels run from {self.labels.min()} to {self.labels.max()}; with "
                f"{self.classes} classes they must lie in 0..{self.classes - 1}"
            )

    def __len__(self) -> int:
        return len(self.labels)

    def batch(self, indices: Indices, epoch: int = 0) -> Batch:
        """Return copies of some images."""
        return Batch(self.images[indices], self.labels[indices])


class Split(NamedTuple):
    """Images to learn from, and others to be tested on."""

    train: ArrayImages
    test: ArrayImages


def normalised(pixels: NDArray[np.generic], mean: float, deviation: float, scale: float) -> Pixels:
    """Return (n, height, width) pixels as (n, 1, height, width), scaled, then standardised."""
    standard = (pixels.astype(np.float32) / np.float32(scale) - np.float32(mean)) / np.float32(
        deviation
    )
    return standard[:, np.newaxis]
