"""Image sets in memory, and how they are cut into batches."""

import threading

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hpc_dl.data import ArrayImages, Batch, batches, digits, synthetic_images
from hpc_dl.errors import DataError, OptionError


def test_digits_are_split_once_and_for_all() -> None:
    train, test = digits()
    again = digits()
    assert (train.images.shape, test.images.shape) == ((1437, 1, 8, 8), (360, 1, 8, 8))
    assert (train.images.dtype, train.labels.dtype) == (np.float32, np.int64)
    np.testing.assert_array_equal(test.images, again.test.images)
    np.testing.assert_array_equal(train.labels, again.train.labels)


def test_digits_are_standardised_by_the_training_images() -> None:
    train, _ = digits()
    assert abs(float(train.images.mean())) < 1e-5
    assert abs(float(train.images.std()) - 1) < 1e-5


def test_no_digit_is_in_both_parts() -> None:
    from sklearn.datasets import load_digits

    train, test = digits()
    together = np.concatenate([train.images, test.images]).reshape(-1, 64)
    original = load_digits().data.astype(np.float32)
    scale = together.std() / original.std()
    restored = (together - together.min()) / scale
    np.testing.assert_allclose(
        np.sort(restored.round(), axis=0), np.sort(original, axis=0), atol=1e-3
    )


def test_labels_of_the_split_have_all_classes() -> None:
    for part in digits():
        counts = np.bincount(part.labels, minlength=10)
        assert counts.min() > 0.05 * len(part)


def test_array_images_must_fit_together() -> None:
    images = np.zeros((3, 1, 2, 2), np.float32)
    with pytest.raises(DataError, match=r"labels of shape \(2,\)"):
        ArrayImages(images, np.zeros(2, np.int64), 10)
    with pytest.raises(DataError, match=r"must lie in 0\.\.1"):
        ArrayImages(images, np.array([0, 1, 2]), 2)


def test_synthetic_images_repeat() -> None:
    noise = synthetic_images(1000, size=4, classes=7, seed=3)
    images, labels = noise.batch(np.array([0, 64, 1]))
    assert (len(noise), images.shape, images.dtype) == (1000, (3, 3, 4, 4), np.float32)
    np.testing.assert_array_equal(images[0], images[1])
    assert (images[0] != images[2]).any()
    assert labels.min() >= 0
    assert labels.max() < 7
    again = synthetic_images(1000, size=4, classes=7, seed=3).batch(np.array([0, 64, 1]))
    np.testing.assert_array_equal(images, again.images)


def test_synthetic_images_need_numbers_above_zero() -> None:
    with pytest.raises(OptionError, match="size=0"):
        synthetic_images(5, size=0)


def numbered(n: int) -> ArrayImages:
    """Make images whose label is their number."""
    return ArrayImages(np.zeros((n, 1, 1, 1), np.float32), np.arange(n), max(n, 1))


@given(st.integers(0, 40), st.integers(1, 15), st.integers(0, 4))
def test_batches_hold_the_samples_in_order(n: int, size: int, ahead: int) -> None:
    order = np.arange(n)[::-1]
    cut = list(batches(numbered(n), order, size, ahead=ahead))
    assert [label for batch in cut for label in batch.labels] == order.tolist()
    assert all(len(batch.labels) == size for batch in cut[:-1])
    assert len(cut) == -(-n // size)


class Watched:
    """A source that notes who asked for which batch, and fails at one of them."""

    classes = 100

    def __init__(self, fails_at: int = -1) -> None:
        self.asked: list[int] = []
        self.threads: set[str] = set()
        self.fails_at = fails_at

    def __len__(self) -> int:
        return 100

    def batch(self, indices: np.ndarray, epoch: int = 0) -> Batch:
        self.asked.append(int(indices[0]))
        self.threads.add(threading.current_thread().name)
        if indices[0] == self.fails_at:
            raise DataError("broken picture")
        return Batch(np.zeros((len(indices), 1, 1, 1), np.float32), indices)


def test_batches_are_prepared_ahead_but_not_further() -> None:
    source = Watched()
    cut = batches(source, np.arange(100), 10, ahead=2)
    next(cut)
    next(cut)
    cut.close()  # type: ignore[attr-defined]
    assert len(source.asked) <= 4
    assert threading.current_thread().name not in source.threads
    assert not any(thread.name in source.threads for thread in threading.enumerate())


@pytest.mark.parametrize("ahead", [0, 2])
def test_an_error_of_the_source_comes_in_its_turn(ahead: int) -> None:
    cut = batches(Watched(fails_at=20), np.arange(100), 10, ahead=ahead)
    assert [int(next(cut).labels[0]) for _ in range(2)] == [0, 10]
    with pytest.raises(DataError, match="broken picture"):
        next(cut)


def test_a_batch_size_of_zero_is_refused_at_once() -> None:
    with pytest.raises(OptionError, match="batch_size=0"):
        batches(numbered(3), np.arange(3), 0)
