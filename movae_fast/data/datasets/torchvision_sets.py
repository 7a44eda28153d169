"""Read the datasets whose files torchvision locates, checks and downloads."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from movae_fast.data.datasets.facts import OMNIGLOT_105_FILES, SVHN_FILES
from movae_fast.data.datasets.image_folders import image_files
from movae_fast.data.datasets.info import images_in_memory, missing
from movae_fast.data.sources import ImageFiles, Images, ReadOptions
from movae_fast.names import first_line

if TYPE_CHECKING:
    from torchvision.datasets import VisionDataset


def open_torchvision(
    name: str,
    reader: str | type,
    files: str,
    options: ReadOptions,
    **kwargs: str | bool,  # arguments of the reader
) -> VisionDataset:
    """Return torchvision's dataset of the class `reader`, downloading its files first if they are absent and
    that is allowed.

    Raises FileNotFoundError, which lists `files`, if they are absent or damaged.
    """
    from torchvision import datasets

    cls = getattr(datasets, reader) if isinstance(reader, str) else reader
    with warnings.catch_warnings():
        # CIFAR's pickles hold an old spelling of a numpy dtype that numpy >= 2.4 warns about.
        warnings.simplefilter("ignore")
        try:
            return cls(options.root, download=False, **kwargs)
        except Exception as on_disk:  # idx files are checked by assertions, .mat files by scipy's own errors
            if not options.download:
                raise missing(name, files, options, f"({first_line(on_disk)})") from None
        try:
            return cls(options.root, download=True, **kwargs)
        except Exception as error:
            why = f"Downloading them failed: {first_line(error)}"
            raise missing(name, files, options, why) from None


def train_or_test(name: str, reader: str, files: str) -> Callable[[ReadOptions], Images]:
    """Return the function that reads a dataset which torchvision holds in memory and opens with the argument
    `train=`."""

    def read(options: ReadOptions) -> Images:
        data = open_torchvision(name, reader, files, options, train=options.split == "train")
        if len(data.data) != len(data.targets):
            counts = f"({len(data.data)} images and {len(data.targets)} labels)"
            raise missing(name, files, options, counts)
        return images_in_memory(data.data, data.targets, options)

    return read


def read_svhn(options: ReadOptions) -> Images:
    """Return a split of SVHN's cropped digits."""
    data = open_torchvision("svhn", "SVHN", SVHN_FILES, options, split=options.split)
    pixels = np.ascontiguousarray(data.data.transpose(0, 2, 3, 1))  # from [N, 3, H, W]
    return images_in_memory(pixels, data.labels, options)


def read_omniglot_105(options: ReadOptions) -> ImageFiles:
    """Return Omniglot's drawings at 105x105: the background alphabets as train, the evaluation alphabets as
    test split."""
    background = options.split == "train"
    data = open_torchvision("omniglot_105", "Omniglot", OMNIGLOT_105_FILES, options, background=background)
    folder = Path(data.target_folder)
    drawings = data._flat_character_images  # pairs of file name and character
    files = [folder / data._characters[character] / name for name, character in drawings]
    labels = [character for _, character in drawings]
    return image_files("omniglot_105", OMNIGLOT_105_FILES, files, labels, options, channels=1)


def listed_files(name: str, reader: str, wanted: str) -> Callable[[ReadOptions], ImageFiles]:
    """Return the function that reads a dataset of image files which torchvision lists with the argument
    `split=`."""

    def read(options: ReadOptions) -> ImageFiles:
        data = open_torchvision(name, reader, wanted, options, split=options.split)
        files = [Path(f) for f in data._image_files]
        absent = [f for f in files if not f.is_file()]
        if absent:
            counts = f"({len(absent)} of {len(files)} {options.split} images are missing, as {absent[0].name})"
            raise missing(name, wanted, options, counts)
        return image_files(name, wanted, files, [int(y) for y in data._labels], options)

    return read
