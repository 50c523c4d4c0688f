"""The handwritten digits that come with scikit-learn: real data with nothing to download.

Alpaydin and Kaynak, "Optical Recognition of Handwritten Digits", UCI Machine Learning
Repository, 1998: 1797 images of 8 x 8 pixels with values from 0 to 16.
"""

import numpy as np

from hpc_dl.data.images import ArrayImages, Split, normalised
from hpc_dl.data.shard import permutation
from hpc_dl.errors import MissingComponentError

#: Images to be tested on, and the seed that picks them: the same in every run.
TEST_IMAGES = 360
SPLIT_SEED = 0


def digits() -> Split:
    """Load the digits, split into 1437 images to learn from and 360 to be tested on.

    Returns:
        float32 images of shape (n, 1, 8, 8), standardised with the mean and deviation of the
        training images, and int64 labels from 0 to 9. The split is the same on all ranks.

    Raises:
        MissingComponentError: scikit-learn is not installed.
    """
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise MissingComponentError(
            "the digits come with scikit-learn, which is not installed; "
            "run `pip install 'hpc_dl[jobs]'`"
        ) from error
    found = load_digits()
    pixels, labels = found.images, found.target.astype(np.int64)
    order = permutation(len(labels), SPLIT_SEED)
    test, train = order[:TEST_IMAGES], order[TEST_IMAGES:]
    mean, deviation = pixels[train].mean() / 16, pixels[train].std() / 16
    images = normalised(pixels, mean, deviation, scale=16)
    return Split(
        ArrayImages(images[train], labels[train], classes=10),
        ArrayImages(images[test], labels[test], classes=10),
    )
