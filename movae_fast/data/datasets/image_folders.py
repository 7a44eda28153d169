"""Read image files from folders, lists and tars: the user's own images, and ImageNet's class folders."""

from __future__ import annotations

import codecs
import os
from collections.abc import Sequence
from pathlib import Path

from movae_fast.data.datasets.facts import FOLDER_FILES, IMAGENET_FILES
from movae_fast.data.datasets.info import missing
from movae_fast.data.find_files import File, LeftAside, find_below, opened
from movae_fast.data.sources import ImageFiles, ReadOptions
from movae_fast.data.tars import images_in, is_tar
from movae_fast.names import shown


def read_folder(options: ReadOptions) -> ImageFiles:
    """Return a split of the user's images in data_dir: its train/ or test/; without those, every tenth image is
    for testing.

    If the folder has no image files but tars, their images are read. data_dir may also be a tar, or a text file
    that lists images and tars, one per line and relative to its own folder.
    """
    root = options.root
    if os.path.isfile(root):  # Path.is_file raises an error if a folder above may not be read.
        aside = LeftAside()
        listed = [root] if is_tar(root) else _listed_files(options)
        files, labels = _every_tenth(*images_in(listed, aside), options.split)
        return image_files("folder", FOLDER_FILES, files, labels, options, aside=aside)
    has_splits = all(os.path.isdir(root / split) for split in ("train", "test"))
    folder = root / options.split if has_splits else root
    below = find_below(folder)
    files, labels = images_in(below.images or below.tars, below.aside)
    if below.images and below.tars:
        below.aside.add(".tar beside image files", str(below.tars[0].relative_to(folder)), len(below.tars))
    if not has_splits:
        files, labels = _every_tenth(files, labels, options.split)
    return image_files("folder", FOLDER_FILES, files, labels, options, aside=below.aside)


def read_imagenet(options: ReadOptions) -> ImageFiles:
    """Return a split of ImageNet: imagenet/train/CLASS/*.JPEG or imagenet/val/CLASS/*.JPEG; classes are
    numbered in the order of their folders' names."""
    splits = ("train",) if options.split == "train" else ("val", "test")
    folders = [options.root / d / split for d in ("imagenet", "ImageNet", ".") for split in splits]
    folder = next((f for f in folders if f.is_dir()), None)
    if folder is None:
        raise missing("imagenet", IMAGENET_FILES, options, "It is never downloaded.")
    classes = sorted(d for d in folder.iterdir() if d.is_dir() and not d.name.startswith("."))
    label_of = {one.name: label for label, one in enumerate(classes)}
    below = find_below(folder)
    depth, files, labels = len(folder.parts), list[Path](), list[int]()
    for path in below.images:
        if len(path.parts) == depth + 1:
            below.aside.add("in no class folder", path.name)
        else:
            files.append(path)
            labels.append(label_of[path.parts[depth]])
    if not files:
        why = f"({folder} has no class folders with images)"
        raise missing("imagenet", IMAGENET_FILES, options, why)
    used = set(labels)
    if empty := [name for name, label in label_of.items() if label not in used]:
        below.aside.add("class folder without an image", empty[0], len(empty))
    if below.tars:
        below.aside.add(".tar", str(below.tars[0].relative_to(folder)), len(below.tars))
    return image_files("imagenet", IMAGENET_FILES, files, labels, options, aside=below.aside)


def image_files(
    name: str,
    wanted: str,  # the files to put into data_dir, for the error
    files: Sequence[File],
    labels: list[int],
    options: ReadOptions,
    channels: int = 3,
    aside: LeftAside | None = None,
) -> ImageFiles:
    """Return image files as an image source that crops each to its central square.

    aside: the files that were found and are not read; they are mentioned in the source's `note`. Raises
    FileNotFoundError if there are no files.
    """
    note = str(aside or "")
    if not files:
        why = f"No {options.split} image was found{note and f' ({note})'}."
        raise missing(name, wanted, options, why)
    mode = "bilinear" if options.resize == "auto" else options.resize
    source = ImageFiles(files, options, None, mode, labels, channels)
    source.note = note
    return source


def _every_tenth(files: list[File], labels: list[int], split: str) -> tuple[list[File], list[int]]:
    rows = [i for i in range(len(files)) if (i % 10 == 9) == (split == "test")]
    return [files[i] for i in rows], [labels[i] for i in rows]


def _listed_files(options: ReadOptions) -> list[Path]:
    """Return the files listed in data_dir, which is a text file. Raises FileNotFoundError if some are
    missing."""
    root = options.root
    files = [_listed_file(root.parent, line) for line in _lines(root) if line.strip()]
    absent = [f for f in files if not os.path.isfile(f)]
    if absent:
        counts = f"({len(absent)} of {len(files)} listed files are missing, as {absent[0]})"
        raise missing("folder", FOLDER_FILES, options, counts)
    return files


def _listed_file(folder: Path, line: str) -> Path:
    """Return the file that a line of a list names; spaces around the name are removed unless a file of that
    exact name exists."""
    exact = folder / line
    return exact if line == line.strip() or os.path.isfile(exact) else folder / line.strip()


def _lines(path: Path) -> list[str]:
    """Return the lines of a list of files, in any usual encoding. Raises ValueError if the file is not a
    text."""
    try:
        with opened(path) as file:
            data = file.read()
        if data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):  # Windows' shells write such lists.
            text = data.decode("utf-16")
        else:
            text = os.fsdecode(data)  # File names need not be UTF-8.
    except OSError as error:
        raise ValueError(f"--data_dir {shown(path)} cannot be read ({error.strerror})") from None
    except UnicodeDecodeError:
        text = "\0"
    if "\0" in text:
        raise ValueError(
            f"--data_dir {shown(path)} is no list of files: one path a line, or a tar, or a folder"
        )
    # A byte-order mark may stand in the middle of lists that were joined.
    return [line.removeprefix("\ufeff").removesuffix("\r") for line in text.split("\n")]
