"""Images in one folder per class, as ImageNet is laid out; decoded when they are needed."""

import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from hpc_dl.data.crop import centre_box, random_box
from hpc_dl.data.images import Batch, Indices, Pixels
from hpc_dl.data.streams import Purpose, stream
from hpc_dl.errors import DataError, MissingComponentError, OptionError

if TYPE_CHECKING:
    from PIL import Image

#: Pillow's number for it.
BILINEAR = 2

#: Mean and deviation of ImageNet's red, green and blue, scaled to 0..1.
MEAN = np.array([0.485, 0.456, 0.406], np.float32)
DEVIATION = np.array([0.229, 0.224, 0.225], np.float32)

ENDINGS = (".bmp", ".jpeg", ".jpg", ".png", ".ppm", ".tif", ".tiff", ".webp")


class Listing(NamedTuple):
    """Which images a folder has. Ranks that share one agree on every image's number."""

    names: tuple[str, ...]
    """The classes' folders, sorted: a label is a position in it."""
    paths: tuple[str, ...]
    """Relative to the folder."""
    labels: NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class ImageFolder:
    """Labelled image files; see `image_folder`."""

    folder: Path
    listing: Listing
    size: int
    augment: bool
    seed: int
    workers: int

    @property
    def names(self) -> tuple[str, ...]:
        """The classes' folders; a label is a position in it."""
        return self.listing.names

    @property
    def labels(self) -> NDArray[np.int64]:
        """The label of each image."""
        return self.listing.labels

    @property
    def classes(self) -> int:
        """The number of classes."""
        return len(self.names)

    def __len__(self) -> int:
        return len(self.listing.paths)

    def batch(self, indices: Indices, epoch: int = 0) -> Batch:
        """Decode some images: (batch, 3, size, size).

        Raises:
            DataError: a file cannot be decoded; names it.
        """
        images = self._threads.map(lambda index: self._load(int(index), epoch), indices)
        stacked = np.stack(list(images)) if len(indices) else self._nothing()
        return Batch(stacked, self.labels[indices])

    @cached_property
    def _threads(self) -> ThreadPoolExecutor:
        return ThreadPoolExecutor(self.workers, thread_name_prefix="decode")

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "_threads"}

    def _nothing(self) -> Pixels:
        return np.empty((0, 3, self.size, self.size), np.float32)

    def _load(self, index: int, epoch: int) -> Pixels:
        from PIL import Image

        path = self.folder / self.listing.paths[index]
        try:
            with Image.open(path) as opened:
                image = opened.convert("RGB")
        except (OSError, SyntaxError, Image.DecompressionBombError) as error:
            raise DataError(f"{path}: cannot be decoded ({error}); repair or remove it") from error
        return self._cut(image, index, epoch)

    def _cut(self, image: "Image.Image", index: int, epoch: int) -> Pixels:
        box, mirrored = centre_box(*image.size), False
        if self.augment:
            generator = np.random.Generator(stream(Purpose.AUGMENT, self.seed, epoch, index))
            box = random_box(*image.size, generator)
            mirrored = bool(generator.random() < 0.5)
        resized = image.resize((self.size, self.size), BILINEAR, box=box)
        standard = (np.asarray(resized, np.float32) / np.float32(255) - MEAN) / DEVIATION
        if mirrored:
            standard = standard[:, ::-1]
        return np.ascontiguousarray(standard.transpose(2, 0, 1))


def image_folder(
    folder: str | os.PathLike[str],
    size: int = 224,
    *,
    augment: bool = False,
    seed: int = 0,
    workers: int = 4,
    listing: Listing | None = None,
) -> ImageFolder:
    """Take the images under ``folder/CLASS/...``; they are decoded when a batch asks for them.

    Args:
        folder: has one folder for each class; their sorted names are the labels 0, 1, ...
        size: height and width of the images handed out, in pixels.
        augment: True, to learn: a random part, randomly mirrored, chosen by (seed, epoch,
            number of the image); False, to test: the middle, 7/8 of the shorter side.
        seed: the number that the random choices derive from.
        workers: threads that decode.
        listing: what ``list_images`` found, on this rank or another; None: look now.

    Returns:
        a set of float32 images (3, size, size) with ImageNet's normalisation.

    Raises:
        DataError: no class folders, or one without images.
        MissingComponentError: Pillow is not installed.
        OptionError: ``size`` or ``workers`` below 1.
    """
    if size < 1 or workers < 1:
        raise OptionError(f"image_folder(size={size}, workers={workers}): give 1 or more of each")
    try:
        import PIL  # noqa: F401
    except ImportError as error:
        raise MissingComponentError(
            "image files are decoded by Pillow, which is not installed; "
            "run `pip install 'hpc_dl[jobs]'`"
        ) from error
    found = list_images(folder) if listing is None else listing
    return ImageFolder(Path(folder), found, size, augment, seed, workers)


def list_images(folder: str | os.PathLike[str]) -> Listing:
    """Find the images under ``folder/CLASS/...``; hidden files and folders are none.

    Raises:
        DataError: no class folders, or one without images.
    """
    root = Path(folder)
    names = _class_names(root)
    paths: list[str] = []
    labels: list[int] = []
    for label, name in enumerate(names):
        found = [os.path.relpath(path, root) for path in _image_files(root / name)]
        if not found:
            raise DataError(
                f"{root / name} has no images ({', '.join(ENDINGS)}); fill or remove the folder"
            )
        paths += found
        labels += [label] * len(found)
    return Listing(names, tuple(paths), np.array(labels, np.int64))


def _class_names(root: Path) -> tuple[str, ...]:
    try:
        folders = [entry.name for entry in os.scandir(root) if entry.is_dir()]
    except OSError as error:
        raise DataError(f"{root}: cannot be read ({error.strerror})") from error
    names = tuple(sorted(name for name in folders if not name.startswith(".")))
    if not names:
        raise DataError(f"{root} has no folders; give one with a folder of images for each class")
    return names


def _image_files(folder: Path) -> Iterator[Path]:
    # Data sets are often put together of links.
    for parent, folders, files in os.walk(folder, followlinks=True):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in sorted(files):
            if name.lower().endswith(ENDINGS) and not name.startswith("."):
                yield Path(parent, name)
