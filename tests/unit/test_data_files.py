"""Image sets from files: what is read, and what is said of files that are wrong."""

import gzip
import pickle
import struct
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from hpc_dl.data import image_folder, list_images, mnist, read_idx
from hpc_dl.errors import DataError, OptionError

CODES = {
    "uint8": 0x08,
    "int8": 0x09,
    "int16": 0x0B,
    "int32": 0x0C,
    "float32": 0x0D,
    "float64": 0x0E,
}


def idx(array: np.ndarray) -> bytes:
    head = struct.pack(f">HBB{array.ndim}I", 0, CODES[array.dtype.name], array.ndim, *array.shape)
    return head + array.astype(array.dtype.newbyteorder(">")).tobytes()


@pytest.mark.parametrize("dtype", CODES)
@pytest.mark.parametrize("pack", [bytes, gzip.compress])
def test_idx_gives_back_what_was_written(
    dtype: str, pack: Callable[[bytes], bytes], tmp_path: Path
) -> None:
    array = np.arange(24).reshape(2, 3, 4).astype(dtype)
    path = tmp_path / "data"
    path.write_bytes(pack(idx(array)))
    found = read_idx(path)
    np.testing.assert_array_equal(found, array)
    assert found.dtype == array.dtype
    assert found.dtype.isnative


GOOD = idx(np.arange(12, dtype=np.uint8).reshape(3, 4))


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "0 bytes"),
        (b"PK\x03\x04" + GOOD, "begins with 504b0304, so it is no IDX file"),
        (b"\x00\x00\x0a\x01" + GOOD[4:], "no IDX file"),
        (GOOD[:7], "ends within its header of 12 bytes"),
        (GOOD[:-1], r"truncated: 23 bytes, but its header says shape \(3, 4\) of uint8"),
        (GOOD + b"x", "too long: 25 bytes"),
        (gzip.compress(GOOD)[:-9], "damaged gzip file"),
        (gzip.compress(GOOD)[:12] + b"\xff" * 20, "damaged gzip file"),
    ],
)
def test_a_damaged_idx_file_is_named_with_its_damage(
    content: bytes, said: str, tmp_path: Path
) -> None:
    path = tmp_path / "some-idx3-ubyte"
    path.write_bytes(content)
    with pytest.raises(DataError, match=said) as raised:
        read_idx(path)
    assert str(path) in str(raised.value)


def test_a_missing_idx_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="cannot be read"):
        read_idx(tmp_path / "nothing")


def write_mnist(folder: Path, train: int = 5, test: int = 3, compressed: bool = False) -> None:
    generator = np.random.default_rng(0)
    for name, count in (("train", train), ("t10k", test)):
        images = generator.integers(0, 256, (count, 28, 28), np.uint8)
        labels = (np.arange(count) % 10).astype(np.uint8)
        for path, array in (
            (f"{name}-images-idx3-ubyte", images),
            (f"{name}-labels-idx1-ubyte", labels),
        ):
            if compressed:
                (folder / f"{path}.gz").write_bytes(gzip.compress(idx(array)))
            else:
                (folder / path).write_bytes(idx(array))


@pytest.mark.parametrize("compressed", [False, True])
def test_mnist_is_read_and_standardised(compressed: bool, tmp_path: Path) -> None:
    write_mnist(tmp_path, compressed=compressed)
    train, test = mnist(tmp_path)
    assert (train.images.shape, test.images.shape) == ((5, 1, 28, 28), (3, 1, 28, 28))
    assert (train.images.dtype, train.labels.dtype) == (np.float32, np.int64)
    ending = ".gz" if compressed else ""
    pixels = read_idx(tmp_path / f"train-images-idx3-ubyte{ending}")
    np.testing.assert_allclose(
        (train.images * 0.3081 + 0.1307) * 255, pixels[:, np.newaxis], atol=1e-3
    )


def test_mnist_with_a_missing_file_names_it_and_the_folder(tmp_path: Path) -> None:
    write_mnist(tmp_path)
    (tmp_path / "t10k-labels-idx1-ubyte").unlink()
    with pytest.raises(DataError, match=r"t10k-labels-idx1-ubyte.*not downloaded"):
        mnist(tmp_path)


def test_mnist_of_two_releases_is_refused(tmp_path: Path) -> None:
    write_mnist(tmp_path)
    (tmp_path / "train-labels-idx1-ubyte").write_bytes(idx(np.zeros(4, np.uint8)))
    with pytest.raises(DataError, match=r"5 images.*4 labels"):
        mnist(tmp_path)


def test_mnist_with_images_for_labels_is_refused(tmp_path: Path) -> None:
    write_mnist(tmp_path)
    (tmp_path / "train-labels-idx1-ubyte").write_bytes(idx(np.zeros((5, 2), np.uint8)))
    with pytest.raises(DataError, match="2 dimensions of uint8; expected 1"):
        mnist(tmp_path)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Make three red and two blue pictures of several shapes."""
    for name, colour, shapes in (
        ("red", (255, 0, 0), [(40, 60), (60, 40), (33, 33)]),
        ("blue", (0, 0, 255), [(64, 32), (100, 100)]),
    ):
        (tmp_path / name / "deeper").mkdir(parents=True)
        for i, shape in enumerate(shapes):
            where = tmp_path / name / ("deeper" if i else "") / f"{i}.PNG"
            Image.new("RGB", shape, colour).save(where)
        (tmp_path / name / "notes.txt").write_text("no picture")
    return tmp_path


def test_hidden_files_and_folders_are_no_images(folder: Path) -> None:
    """Of archives from other systems, and of notebooks."""
    (folder / "red" / "._0.png").write_bytes(b"no picture")
    for hidden in (folder / ".checkpoints", folder / "red" / ".trash"):
        hidden.mkdir()
        Image.new("RGB", (20, 20)).save(hidden / "old.png")
    assert list_images(folder).names == ("blue", "red")
    assert len(image_folder(folder, 16)) == 5


def test_links_to_folders_are_followed(
    folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    linked = tmp_path_factory.mktemp("linked")
    (linked / "colours").mkdir()
    (linked / "colours" / "red").symlink_to(folder / "red")
    assert len(image_folder(linked, 16)) == 3


def test_ranks_take_one_listing(folder: Path) -> None:
    """A rank that lacks a file says which, and does not number the others anew."""
    listing = list_images(folder)
    missing = folder / listing.paths[1]
    missing.unlink()
    found = image_folder(folder, 16, listing=listing)
    assert len(found) == 5
    assert found.batch(np.array([4])).labels.tolist() == [1]
    with pytest.raises(DataError, match="cannot be decoded") as raised:
        found.batch(np.array([1]))
    assert str(missing) in str(raised.value)


def test_an_image_folder_that_has_decoded_can_be_pickled(folder: Path) -> None:
    found = image_folder(folder, 16)
    images = found.batch(np.arange(5)).images
    again = pickle.loads(pickle.dumps(found))
    np.testing.assert_array_equal(again.batch(np.arange(5)).images, images)


@pytest.mark.parametrize("augment", [False, True])
def test_image_folder_labels_by_sorted_folder(folder: Path, augment: bool) -> None:
    found = image_folder(folder, 16, augment=augment)
    assert found.names == ("blue", "red")
    assert (len(found), found.classes) == (5, 2)
    images, labels = found.batch(np.array([4, 0]))
    assert (images.shape, images.dtype) == ((2, 3, 16, 16), np.float32)
    assert labels.tolist() == [1, 0]
    red = (np.array([1, 0, 0]) - [0.485, 0.456, 0.406]) / [0.229, 0.224, 0.225]
    np.testing.assert_allclose(images[0].mean((1, 2)), red, rtol=1e-5)


def test_no_indices_give_an_empty_batch(folder: Path) -> None:
    images, labels = image_folder(folder, 16).batch(np.empty(0, np.int64))
    assert (images.shape, labels.shape) == ((0, 3, 16, 16), (0,))


def test_the_middle_is_seven_eighths_of_the_shorter_side(tmp_path: Path) -> None:
    """A white frame of 1/16 around black must be cut off exactly."""
    (tmp_path / "only").mkdir()
    pixels = np.full((128, 128, 3), 255, np.uint8)
    pixels[8:120, 8:120] = 0
    Image.fromarray(pixels).save(tmp_path / "only" / "frame.png")
    images, _ = image_folder(tmp_path, 112).batch(np.array([0]))
    assert np.ptp(images, axis=(2, 3)).max() == 0


def test_random_parts_depend_on_seed_epoch_and_number_alone(tmp_path: Path) -> None:
    (tmp_path / "only").mkdir()
    pixels = np.random.default_rng(0).integers(0, 256, (48, 48, 3), np.uint8)
    for name in "ab":
        Image.fromarray(pixels).save(tmp_path / "only" / f"{name}.png")
    found = image_folder(tmp_path, 8, augment=True, seed=1)
    first = found.batch(np.array([0, 1]), epoch=2).images
    swapped = found.batch(np.array([1, 0]), epoch=2).images
    np.testing.assert_array_equal(first, swapped[::-1])
    others = [
        first[1],
        found.batch(np.array([0]), epoch=3).images[0],
        image_folder(tmp_path, 8, augment=True, seed=2).batch(np.array([0]), epoch=2).images[0],
    ]
    assert all((other != first[0]).any() for other in others)


def test_half_of_the_random_parts_are_mirrored(tmp_path: Path) -> None:
    (tmp_path / "only").mkdir()
    ramp = np.broadcast_to(np.arange(64, dtype=np.uint8)[None, :, None], (64, 64, 3))
    Image.fromarray(np.ascontiguousarray(ramp)).save(tmp_path / "only" / "ramp.png")
    found = image_folder(tmp_path, 8, augment=True)
    rising = sum(
        bool(np.diff(found.batch(np.array([0]), epoch).images[0, 0, 4]).mean() > 0)
        for epoch in range(200)
    )
    assert 70 <= rising <= 130


def test_grey_and_transparent_pictures_become_colour(tmp_path: Path) -> None:
    (tmp_path / "only").mkdir()
    for mode in ("L", "RGBA", "P"):
        Image.new(mode, (20, 20)).save(tmp_path / "only" / f"{mode}.png")
    assert image_folder(tmp_path, 8).batch(np.arange(3)).images.shape == (3, 3, 8, 8)


def test_a_picture_that_cannot_be_decoded_is_named(folder: Path) -> None:
    broken = folder / "blue" / "0.PNG"
    broken.write_bytes(broken.read_bytes()[:60])
    with pytest.raises(DataError, match="cannot be decoded") as raised:
        image_folder(folder, 16).batch(np.array([0]))
    assert str(broken) in str(raised.value)


def test_folders_without_pictures_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="cannot be read"):
        image_folder(tmp_path / "nothing")
    with pytest.raises(DataError, match="has no folders"):
        image_folder(tmp_path)
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="empty has no images"):
        image_folder(tmp_path)
    with pytest.raises(OptionError, match="size=0"):
        image_folder(tmp_path, 0)
