"""MNIST, or another data set in its form, from IDX files that are already there."""

import os
from pathlib import Path

import numpy as np

from hpc_dl.data.idx import read_idx
from hpc_dl.data.images import ArrayImages, Split, normalised
from hpc_dl.errors import DataError

#: Mean and deviation of MNIST's training pixels, scaled to 0..1.
MEAN, DEVIATION = 0.1307, 0.3081

_SEPARATORS, _ENDINGS = "-.", ("", ".gz")


def mnist(folder: str | os.PathLike[str]) -> Split:
    """Load MNIST from a folder; nothing is ever downloaded.

    Args:
        folder: has ``train-images-idx3-ubyte``, ``train-labels-idx1-ubyte``,
            ``t10k-images-idx3-ubyte`` and ``t10k-labels-idx1-ubyte``, plain or ``.gz``; a dot
            before ``idx`` is accepted too.

    Returns:
        float32 images of shape (n, 1, 28, 28), standardised, and int64 labels from 0 to 9.

    Raises:
        DataError: a file is missing, damaged or does not fit the others.
    """
    return Split(_part(Path(folder), "train"), _part(Path(folder), "t10k"))


def _part(folder: Path, name: str) -> ArrayImages:
    images_path = _find(folder, f"{name}-images", "idx3")
    labels_path = _find(folder, f"{name}-labels", "idx1")
    pixels, labels = read_idx(images_path), read_idx(labels_path)
    for path, array, dimensions in ((images_path, pixels, 3), (labels_path, labels, 1)):
        if array.ndim != dimensions or array.dtype != np.uint8:
            raise DataError(
                f"{path}: {array.ndim} dimensions of {array.dtype}; expected {dimensions} of uint8"
            )
    if len(pixels) != len(labels):
        raise DataError(
            f"{images_path} has {len(pixels)} images, but {labels_path} has {len(labels)} labels; "
            "take both from the same release"
        )
    return ArrayImages(
        normalised(pixels, MEAN, DEVIATION, scale=255), labels.astype(np.int64), classes=10
    )


def _find(folder: Path, name: str, kind: str) -> Path:
    for separator in _SEPARATORS:
        for ending in _ENDINGS:
            path = folder / f"{name}{separator}{kind}-ubyte{ending}"
            if path.is_file():
                return path
    raise DataError(
        f"{folder} has no {name}-{kind}-ubyte (or .gz); name the folder that holds the four IDX "
        "files of MNIST. They are not downloaded for you"
    )
