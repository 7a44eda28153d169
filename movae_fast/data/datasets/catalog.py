"""The datasets: a record each, and a reader of its original files. What a reader returns is in `sources.py`."""

from __future__ import annotations

import codecs
import os
import shutil
import warnings
import zipfile
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from torchvision import datasets as tv

from movae_fast.data.datasets import factor_grids as grids
from movae_fast.data.datasets import sprites
from movae_fast.data.fetch import Remote, fetch, first_line
from movae_fast.data.find_files import Aside, File, found_below, opened
from movae_fast.data.sources import ImageFiles, Images, ReadOptions, in_memory, missing
from movae_fast.data.tars import images_in, is_tar
from movae_fast.data.transforms import CELEBA_CROPS
from movae_fast.names import shown

Source = sprites.Sprites | Images | ImageFiles | grids.GridImages


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
    factor_sizes: tuple[int, ...] = ()  # numbers of values; empty where factors are continuous


def _missing(name: str, options: ReadOptions, error: Exception | str) -> FileNotFoundError:
    return missing(name, DATASETS[name].files, options, error)


def _torchvision(name: str, cls: type, options: ReadOptions, **kwargs: Any) -> Any:
    """A torchvision dataset that is on disk and whole, or downloaded if that is allowed."""
    with warnings.catch_warnings():
        # CIFAR's pickles hold an old numpy dtype spelling that numpy >= 2.4 warns about.
        warnings.simplefilter("ignore")
        try:
            return cls(options.root, download=False, **kwargs)
        except Exception as on_disk:  # idx files are checked by assertions, .mat files by scipy's own errors
            if not options.download:
                raise _missing(name, options, f"({first_line(on_disk)})") from None
        try:
            return cls(options.root, download=True, **kwargs)
        except Exception as error:
            raise _missing(name, options, f"Downloading them failed: {first_line(error)}") from None


def _train_or_test(name: str, cls: type) -> Callable[[ReadOptions], Source]:
    def read(options: ReadOptions) -> Source:
        data = _torchvision(name, cls, options, train=options.split == "train")
        if len(data.data) != len(data.targets):
            raise _missing(name, options, f"({len(data.data)} images and {len(data.targets)} labels)")
        return in_memory(data.data, data.targets, options)

    return read


def _svhn(options: ReadOptions) -> Source:
    data = _torchvision("svhn", tv.SVHN, options, split=options.split)
    return in_memory(np.ascontiguousarray(data.data.transpose(0, 2, 3, 1)), data.labels, options)


def _celeba(options: ReadOptions) -> Source:
    folder = next((f for f in ("celeba", "CelebA") if (options.root / f).is_dir()), "celeba")
    reader = type("CelebA", (tv.CelebA,), {"base_folder": folder})
    unpack(options.root / folder / "img_align_celeba.zip", options.root / folder / "img_align_celeba")
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
    """Every image below data_dir: its train/ and test/ where they are, else every tenth image for testing.

    Where no image lies there but tars do, the images in those. Where data_dir is a tar, or a text file that
    lists images and tars, one a line and relative to its folder: those.
    """
    root = options.root
    if os.path.isfile(root):  # unlike Path's, also where a folder above may not be read
        aside = Aside()
        listed = [root] if is_tar(root) else _listed_files(options)
        files, labels = _every_tenth(*images_in(listed, aside), options.split)
        return _files("folder", files, labels, options, aside=aside)
    parted = all(os.path.isdir(root / part) for part in ("train", "test"))
    below = root / options.split if parted else root
    found = found_below(below)
    files, labels = images_in(found.images or found.tars, found.aside)
    if found.images and found.tars:
        found.aside.add(".tar beside image files", str(found.tars[0].relative_to(below)), len(found.tars))
    if not parted:
        files, labels = _every_tenth(files, labels, options.split)
    return _files("folder", files, labels, options, aside=found.aside)


def _every_tenth(files: list[File], labels: list[int], split: str) -> tuple[list[File], list[int]]:
    rows = [i for i in range(len(files)) if (i % 10 == 9) == (split == "test")]
    return [files[i] for i in rows], [labels[i] for i in rows]


def _binary_mnist(options: ReadOptions) -> Source:
    """Larochelle's fixed binarisation: 50,000 lines of 784 zeros and ones (its validation part is left out)."""
    filename = f"binarized_mnist_{options.split}.amat"
    path = next((p for d in ("binary_mnist", ".") if (p := options.root / d / filename).is_file()), None)
    if path is None and options.download:
        path = options.root / "binary_mnist" / filename
        try:
            fetch(BINARY_MNIST[options.split], path)
        except OSError as error:
            raise _missing("binary_mnist", options, f"Downloading failed: {first_line(error)}") from None
    if path is None:
        raise _missing("binary_mnist", options, "")
    # A line is 784 digits with a blank or the line's end after each: no need to parse numbers.
    data, size = np.fromfile(path, np.uint8), BINARY_MNIST[options.split].size
    pixels = data[::2] - ord("0") if len(data) else data
    if len(data) != size or pixels.max() > 1:
        lines = f"{size // (2 * 784):,} lines of 784 zeros and ones, separated by single blanks"
        found = f"({path.name} of {len(data):,} bytes: expected {lines}, {size:,} bytes)"
        raise _missing("binary_mnist", options, found)
    images = 255 * pixels.reshape(-1, 28, 28)
    return in_memory(images, np.zeros(len(images), np.int64), options)


def _omniglot(options: ReadOptions) -> Source:
    """The 28x28 split of Burda et al. (IWAE), in chardata.mat; labels are alphabets."""
    from scipy.io import loadmat

    path = next((p for d in ("omniglot", ".") if (p := options.root / d / "chardata.mat").is_file()), None)
    if path is None:
        raise _missing("omniglot", options, "It is not downloaded by this program." * options.download)
    data, target = ("data", "target") if options.split == "train" else ("testdata", "testtarget")
    try:
        tables = loadmat(path)
        pixels, alphabets = tables[data], tables[target]
    except Exception as error:  # scipy's readers have errors of many kinds
        raise _missing("omniglot", options, f"({path.name}: {first_line(error)})") from None
    n = pixels.shape[-1]
    if pixels.shape != (784, n) or alphabets.shape != (50, n):
        found = (
            f"({data} {list(pixels.shape)} and {target} {list(alphabets.shape)}, expected [784, N] and [50, N])"
        )
        raise _missing("omniglot", options, found)
    # Columns are images, written by Matlab: the first index of an image varies fastest.
    images = (pixels.T.reshape(n, 28, 28).transpose(0, 2, 1) * 255).round().astype(np.uint8)
    return in_memory(images, alphabets.argmax(0), options)


def _omniglot_105(options: ReadOptions) -> Source:
    """The original drawings: background alphabets for training, evaluation alphabets for testing."""
    data = _torchvision("omniglot_105", tv.Omniglot, options, background=options.split == "train")
    folder = Path(data.target_folder)
    drawings = [(folder / data._characters[y] / name, y) for name, y in data._flat_character_images]
    files, labels = [f for f, _ in drawings], [y for _, y in drawings]
    return _files("omniglot_105", files, labels, options, channels=1)


def _listed(name: str, cls: type) -> Callable[[ReadOptions], Source]:
    """A torchvision dataset that lists image files; training on `train`, testing on `test`."""

    def read(options: ReadOptions) -> Source:
        data = _torchvision(name, cls, options, split=options.split)
        files = [Path(f) for f in data._image_files]
        absent = [f for f in files if not f.is_file()]
        if absent:
            found = f"({len(absent)} of {len(files)} {options.split} images are missing, as {absent[0].name})"
            raise _missing(name, options, found)
        return _files(name, files, [int(y) for y in data._labels], options)

    return read


def _imagenet(options: ReadOptions) -> Source:
    """Class folders: imagenet/train/n01440764/*.JPEG and imagenet/val/…, classes in the folders' order."""
    parts = ("train",) if options.split == "train" else ("val", "test")
    folders = [options.root / d / part for d in ("imagenet", "ImageNet", ".") for part in parts]
    folder = next((f for f in folders if f.is_dir()), None)
    if folder is None:
        raise _missing("imagenet", options, "It is never downloaded.")
    classes = sorted(d for d in folder.iterdir() if d.is_dir() and not d.name.startswith("."))
    label_of = {one.name: label for label, one in enumerate(classes)}
    found = found_below(folder)
    start, files, labels = len(folder.parts), [], []
    for path in found.images:
        if len(path.parts) == start + 1:
            found.aside.add("in no class folder", path.name)
        else:
            files.append(path)
            labels.append(label_of[path.parts[start]])
    if not files:
        raise _missing("imagenet", options, f"({folder} has no class folders with images)")
    used = set(labels)
    if empty := [name for name, label in label_of.items() if label not in used]:
        found.aside.add("class folder without an image", empty[0], len(empty))
    if found.tars:
        found.aside.add(".tar", str(found.tars[0].relative_to(folder)), len(found.tars))
    return _files("imagenet", files, labels, options, aside=found.aside)


def _files(
    name: str,
    files: Sequence[File],
    labels: list[int],
    options: ReadOptions,
    channels: int = 3,
    aside: Aside | None = None,
) -> ImageFiles:
    note = str(aside or "")
    if not files:
        raise _missing(name, options, f"No {options.split} image was found{note and f' ({note})'}.")
    mode = "bilinear" if options.resize == "auto" else options.resize
    source = ImageFiles(files, options, None, mode, labels, channels)
    source.note = note
    return source


def _listed_files(options: ReadOptions) -> list[Path]:
    """The files that the text file data_dir names."""
    root = options.root
    every = [_listed_file(root.parent, line) for line in _lines(root) if line.strip()]
    absent = [f for f in every if not os.path.isfile(f)]
    if absent:
        found = f"({len(absent)} of {len(every)} listed files are missing, as {absent[0]})"
        raise _missing("folder", options, found)
    return every


def _listed_file(folder: Path, line: str) -> Path:
    """The file that a line names; blanks around it count only where a name has them."""
    exact = folder / line
    return exact if line == line.strip() or os.path.isfile(exact) else folder / line.strip()


def _lines(path: Path) -> list[str]:
    """The lines of a list of files, whatever editor wrote it. Raises ValueError for what is no text."""
    try:
        with opened(path) as file:
            data = file.read()
        if data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):  # as Windows' shells write lists
            text = data.decode("utf-16")
        else:
            text = os.fsdecode(data)  # names need not be UTF-8
    except OSError as error:
        raise ValueError(f"--data_dir {shown(path)} cannot be read ({error.strerror})") from None
    except UnicodeDecodeError:
        text = "\0"
    if "\0" in text:
        raise ValueError(
            f"--data_dir {shown(path)} is no list of files: one path a line, or a tar, or a folder"
        )
    # A mark of byte order may stand in the middle of lists that were joined.
    return [line.removeprefix("\ufeff").removesuffix("\r") for line in text.split("\n")]


def unpack(archive: Path, folder: Path) -> None:
    """Unpack `folder` from the archive beside it, where it is not there yet; all of it or nothing."""
    if folder.exists() or not archive.is_file():
        return
    part = folder.with_name(f"{folder.name}.{os.getpid()}.part")
    try:
        with zipfile.ZipFile(archive) as file:
            file.extractall(part)  # checks every file's CRC
        (part / folder.name).rename(folder)
    except (zipfile.BadZipFile, OSError, EOFError, zlib.error) as error:
        if not folder.exists():  # another process may have been faster
            raise ValueError(
                f"{shown(archive)} cannot be unpacked ({first_line(error)}): fetch it again"
            ) from None
    finally:
        shutil.rmtree(part, ignore_errors=True)


def _sprites(options: ReadOptions) -> Source:
    index = sprites.split_index(options.split)
    return sprites.Sprites(index, options.image_size, options.device, options.antialias)


def _digits(options: ReadOptions) -> Source:
    from sklearn.datasets import load_digits

    digits = load_digits()
    order = np.random.RandomState(0).permutation(len(digits.images))
    rows = order[-297:] if options.split == "test" else order[:-297]
    pixels = (digits.images[rows] * (255 / 16)).round().astype(np.uint8)
    return in_memory(pixels, digits.target[rows], options)


_TORONTO = "http://www.cs.toronto.edu/~larocheh/public/datasets/binarized_mnist/"
BINARY_MNIST = {
    "train": Remote(
        f"{_TORONTO}binarized_mnist_train.amat",
        78_400_000,
        "ad693b29f94c14277b095f5238ddefbbdaaae0939789dd2f4f0205278cee3e4d",
    ),
    "test": Remote(
        f"{_TORONTO}binarized_mnist_test.amat",
        15_680_000,
        "e6687bfea3f820c174f33b7865140b2a2dd2930ef786f35d45795fc193b5ab2c",
    ),
}
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
            "your images (png, jpg, webp, bmp, tif, …) or tars of them, in train/ and test/, or anyhow and "
            "every tenth is for testing",
            flip=True,
            classes=1,
        ),
        DatasetInfo("celeba", 3, 178, 64, 162_770, 19_962, _celeba, _CELEBA, flip=True, classes=1),
        DatasetInfo(
            "binary_mnist",
            1,
            28,
            32,
            50_000,
            10_000,
            _binary_mnist,
            "binary_mnist/binarized_mnist_train.amat, binary_mnist/binarized_mnist_test.amat, from " + _TORONTO,
            classes=1,
        ),
        DatasetInfo(
            "omniglot",
            1,
            28,
            32,
            24_345,
            8_070,
            _omniglot,
            "omniglot/chardata.mat from https://github.com/yburda/iwae (datasets/OMNIGLOT)",
            classes=50,
        ),
        DatasetInfo(
            "omniglot_105",
            1,
            105,
            64,
            19_280,
            13_180,
            _omniglot_105,
            "omniglot-py/images_background.zip, omniglot-py/images_evaluation.zip, both also unpacked there",
            classes=964,
        ),
        DatasetInfo(
            "flowers102",
            3,
            500,
            64,
            1_020,
            6_149,
            _listed("flowers102", tv.Flowers102),
            "flowers-102/jpg/*.jpg, flowers-102/imagelabels.mat, flowers-102/setid.mat",
            flip=True,
            classes=102,
        ),
        DatasetInfo(
            "dtd",
            3,
            300,
            64,
            1_880,
            1_880,
            _listed("dtd", tv.DTD),
            "dtd/dtd/images/*/*.jpg, dtd/dtd/labels/*.txt (dtd-r1.0.1.tar.gz unpacked in dtd)",
            flip=True,
            classes=47,
        ),
        DatasetInfo(
            "imagenet",
            3,
            469,
            64,
            1_281_167,
            50_000,
            _imagenet,
            "imagenet/train/CLASS/*.JPEG and imagenet/val/CLASS/*.JPEG, from https://image-net.org",
            flip=True,
            classes=1000,
        ),
        DatasetInfo(
            "ident3d",
            3,
            224,
            64,
            250_000,
            25_000,
            grids.read_ident3d,
            grids.IDENT3D_FILES,
            classes=1,
            factor_names=grids.IDENT3D_NAMES,
        ),
        *(
            DatasetInfo(
                name,
                3 if len(grid.image) == 3 else 1,
                64,
                64,
                grid.size - grids.N_TEST,
                grids.N_TEST,
                grids.grid_reader(name),
                grid.files,
                classes=grid.sizes[next(i for i, n in enumerate(grid.names) if n.endswith("shape"))],
                factor_names=grid.names,
                factor_sizes=grid.sizes,
            )
            for name, grid in grids.GRIDS.items()
        ),
    )
}
