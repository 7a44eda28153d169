"""The datasets: a record each, and a reader of its original files.

A reader returns an image source for a split: something with `__len__` and `gather(rows) -> (uint8 images
[B, C, S, S], labels [B])`, or, where files must be decoded, a torch Dataset of (uint8 image, label).
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torchvision import datasets as tv

from movae_fast.data import sprites
from movae_fast.data.transforms import CELEBA_CROPS, resize

Box = tuple[int, int, int, int]  # top, left, height, width in pixels
IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")


@dataclass(frozen=True)
class ReadOptions:
    """What a reader needs to know: where, which split, what to make of an image."""

    root: Path
    split: str  # "train" | "test"
    image_size: int
    download: bool
    device: torch.device
    crop: str = "center148"
    resize: str = "auto"
    antialias: bool = False


class Images:
    """An image source in memory: uint8 [N, C, S, S] and labels [N] int64, wherever they lie."""

    def __init__(self, images: Tensor, labels: Tensor) -> None:
        self.images, self.labels = images, labels

    def __len__(self) -> int:
        return len(self.images)

    def gather(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Rows [B] to images [B, C, S, S] uint8 and labels [B]."""
        return self.images[rows], self.labels[rows]


class ImageFiles(torch.utils.data.Dataset):
    """Image files, cropped to `box` (or to the central square) and resized as they are read; label 0."""

    def __init__(self, files: Sequence[Path], options: ReadOptions, box: Box | None, mode: str) -> None:
        self.files, self.box, self.mode, self.size = list(files), box, mode, options.image_size

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, i: int) -> tuple[Tensor, int]:
        try:
            with Image.open(self.files[i]) as file:
                pixels = torch.from_numpy(np.array(file.convert("RGB"))).permute(2, 0, 1)
        except (OSError, ValueError, Image.DecompressionBombError) as error:
            raise ValueError(f"{self.files[i]} is not a readable image ({error}); mend or remove it") from None
        side = min(pixels.shape[1:])
        top, left, height, width = self.box or (
            (pixels.shape[1] - side) // 2,
            (pixels.shape[2] - side) // 2,
            side,
            side,
        )
        return resize(pixels[:, top : top + height, left : left + width], self.size, self.mode), 0


Source = sprites.Sprites | Images | ImageFiles


@dataclass(frozen=True)
class DatasetInfo:
    """One dataset: what it is, how large, where its files are, and who reads them."""

    name: str
    channels: int
    native_size: int
    default_size: int
    n_train: int
    n_test: int
    read: Callable[[ReadOptions], Source]
    files: str  # what to put where, for whoever has no network
    flip: bool = False  # mirror images at random while training
    classes: int = 10
    factor_names: tuple[str, ...] = ()
    factor_sizes: tuple[int, ...] = ()


def _missing(name: str, options: ReadOptions, error: Exception | str) -> FileNotFoundError:
    how = "" if options.download else " (--download false: nothing was fetched)"
    return FileNotFoundError(
        f"--dataset {name}: not found or damaged in --data_dir {options.root}{how}; wanted there: "
        f"{DATASETS[name].files}. {error}"
    )


def _torchvision(name: str, cls: type, options: ReadOptions, **kwargs: Any) -> Any:
    """A torchvision dataset that is on disk and whole, or downloaded if that is allowed."""
    with warnings.catch_warnings():
        # CIFAR's pickles hold an old numpy dtype spelling that numpy >= 2.4 warns about.
        warnings.simplefilter("ignore")
        try:
            return cls(options.root, download=False, **kwargs)
        except Exception as on_disk:  # idx files are checked by assertions, .mat files by scipy's own errors
            if not options.download:
                raise _missing(name, options, f"({_first_line(on_disk)})") from None
        try:
            return cls(options.root, download=True, **kwargs)
        except Exception as error:
            raise _missing(name, options, f"Downloading them failed: {_first_line(error)}") from None


def _first_line(error: Exception) -> str:
    return str(error).splitlines()[0] if str(error) else type(error).__name__


def _in_memory(images: Any, labels: Any, options: ReadOptions) -> Images:
    pixels = torch.as_tensor(np.asarray(images))
    if pixels.dim() == 3:  # [N, H, W]
        pixels = pixels[:, None]
    elif pixels.shape[-1] == 3:  # [N, H, W, 3]
        pixels = pixels.permute(0, 3, 1, 2)
    pixels = resize(pixels.contiguous(), options.image_size, options.resize)
    return Images(pixels, torch.as_tensor(np.asarray(labels)).long())


def _train_or_test(name: str, cls: type) -> Callable[[ReadOptions], Source]:
    def read(options: ReadOptions) -> Source:
        data = _torchvision(name, cls, options, train=options.split == "train")
        if len(data.data) != len(data.targets):
            raise _missing(name, options, f"({len(data.data)} images and {len(data.targets)} labels)")
        return _in_memory(data.data, data.targets, options)

    return read


def _svhn(options: ReadOptions) -> Source:
    data = _torchvision("svhn", tv.SVHN, options, split=options.split)
    return _in_memory(np.ascontiguousarray(data.data.transpose(0, 2, 3, 1)), data.labels, options)


def _celeba(options: ReadOptions) -> Source:
    folder = next((f for f in ("celeba", "CelebA") if (options.root / f).is_dir()), "celeba")
    reader = type("CelebA", (tv.CelebA,), {"base_folder": folder})
    celeba = _torchvision("celeba", reader, options, split=options.split, target_type="attr")
    # torchvision looks for the folder of images only; one that is missing should not end a run hours later.
    images = options.root / folder / "img_align_celeba"
    there = set(os.listdir(images))
    absent = [name for name in celeba.filename if name not in there]
    if absent:
        found = f"({len(absent)} of {len(celeba.filename)} {options.split} images are missing, as {absent[0]})"
        raise _missing("celeba", options, found)
    files = [images / name for name in celeba.filename]
    box = CELEBA_CROPS[options.crop] or (0, 0, 218, 178)
    return ImageFiles(files, options, box, "bicubic" if options.resize == "auto" else options.resize)


def _folder(options: ReadOptions) -> Source:
    """Every image below data_dir: its train/ and test/ where they are, else every tenth file for testing."""

    def images(root: Path) -> list[Path]:
        return sorted(p for p in root.rglob("*") if p.suffix.lower() in IMAGE_SUFFIXES)

    if (options.root / "train").is_dir() and (options.root / "test").is_dir():
        files = images(options.root / options.split)
    else:
        test = options.split == "test"
        files = [p for i, p in enumerate(images(options.root)) if (i % 10 == 9) == test]
    if not files:
        raise _missing("folder", options, f"No {options.split} image was found.")
    return ImageFiles(files, options, None, "bilinear" if options.resize == "auto" else options.resize)


def _sprites(options: ReadOptions) -> Source:
    index = sprites.split_index(options.split)
    return sprites.Sprites(index, options.image_size, options.device, options.antialias)


def _digits(options: ReadOptions) -> Source:
    from sklearn.datasets import load_digits

    digits = load_digits()
    order = np.random.RandomState(0).permutation(len(digits.images))
    rows = order[-297:] if options.split == "test" else order[:-297]
    pixels = (digits.images[rows] * (255 / 16)).round().astype(np.uint8)
    return _in_memory(pixels, digits.target[rows], options)


_GZ = "train-images-idx3-ubyte, train-labels-idx1-ubyte, t10k-images-idx3-ubyte, t10k-labels-idx1-ubyte"
_CELEBA = (
    "celeba/img_align_celeba.zip or celeba/img_align_celeba/*.jpg, celeba/list_eval_partition.txt, "
    "celeba/list_attr_celeba.txt, celeba/identity_CelebA.txt, celeba/list_bbox_celeba.txt, "
    "celeba/list_landmarks_align_celeba.txt"
)

DATASETS: dict[str, DatasetInfo] = {
    info.name: info
    for info in (
        DatasetInfo(
            "sprites",
            1,
            64,
            64,
            sprites.SIZE - 10_000,
            10_000,
            _sprites,
            "nothing, it is rendered",
            classes=3,
            factor_names=sprites.FACTOR_NAMES,
            factor_sizes=sprites.FACTOR_SIZES,
        ),
        DatasetInfo("digits", 1, 8, 32, 1500, 297, _digits, "nothing, it comes with scikit-learn"),
        DatasetInfo(
            "mnist", 1, 28, 32, 60_000, 10_000, _train_or_test("mnist", tv.MNIST), f"MNIST/raw/{{{_GZ}}}"
        ),
        DatasetInfo(
            "fashion_mnist",
            1,
            28,
            32,
            60_000,
            10_000,
            _train_or_test("fashion_mnist", tv.FashionMNIST),
            f"FashionMNIST/raw/{{{_GZ}}}",
        ),
        DatasetInfo(
            "cifar10",
            3,
            32,
            32,
            50_000,
            10_000,
            _train_or_test("cifar10", tv.CIFAR10),
            "cifar-10-python.tar.gz or its folder cifar-10-batches-py",
            flip=True,
        ),
        DatasetInfo(
            "cifar100",
            3,
            32,
            32,
            50_000,
            10_000,
            _train_or_test("cifar100", tv.CIFAR100),
            "cifar-100-python.tar.gz or its folder cifar-100-python",
            flip=True,
            classes=100,
        ),
        DatasetInfo("svhn", 3, 32, 32, 73_257, 26_032, _svhn, "train_32x32.mat, test_32x32.mat"),
        DatasetInfo(
            "folder",
            3,
            64,
            64,
            0,
            0,
            _folder,
            "your images (png, jpg, webp, bmp), in train/ and test/, or anyhow and every tenth is for testing",
            flip=True,
            classes=1,
        ),
        DatasetInfo("celeba", 3, 178, 64, 162_770, 19_962, _celeba, _CELEBA, flip=True, classes=1),
    )
}
