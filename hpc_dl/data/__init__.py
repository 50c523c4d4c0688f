"""Labelled images, and how an epoch of them is shared among the ranks."""

from hpc_dl.data.batches import batches
from hpc_dl.data.characters import Text, python_help, windows
from hpc_dl.data.digits import digits
from hpc_dl.data.idx import read_idx
from hpc_dl.data.image_folder import ImageFolder, Listing, image_folder, list_images
from hpc_dl.data.images import ArrayImages, Batch, Images, Split
from hpc_dl.data.mnist import mnist
from hpc_dl.data.shard import Remainder, permutation, shard_indices
from hpc_dl.data.synthetic import SyntheticImages, synthetic_images

__all__ = [
    "ArrayImages",
    "Batch",
    "ImageFolder",
    "Images",
    "Listing",
    "Remainder",
    "Split",
    "SyntheticImages",
    "Text",
    "batches",
    "digits",
    "image_folder",
    "list_images",
    "mnist",
    "permutation",
    "python_help",
    "read_idx",
    "shard_indices",
    "synthetic_images",
    "windows",
]
