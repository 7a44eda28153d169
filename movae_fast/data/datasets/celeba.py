"""Read CelebA's aligned JPEGs, from their folder or from the zip archive beside it."""

from __future__ import annotations

import os
import shutil
import zipfile
import zlib
from pathlib import Path

from movae_fast.data.datasets.facts import CELEBA_CROPS, CELEBA_FILES
from movae_fast.data.datasets.info import missing
from movae_fast.data.datasets.torchvision_sets import open_torchvision
from movae_fast.data.sources import ImageFiles, ReadOptions
from movae_fast.names import first_line, shown

WHOLE = (0, 0, 218, 178)  # top, left, height, width


def read_celeba(options: ReadOptions) -> ImageFiles:
    """Return a split of CelebA, cropped as the options say; the archive is unpacked first if necessary.

    Raises FileNotFoundError if files are missing.
    """
    from torchvision.datasets import CelebA

    base = next((name for name in ("celeba", "CelebA") if (options.root / name).is_dir()), "celeba")
    reader = type("CelebA", (CelebA,), {"base_folder": base})
    images = options.root / base / "img_align_celeba"
    unpack(options.root / base / "img_align_celeba.zip", images)
    celeba = open_torchvision("celeba", reader, CELEBA_FILES, options, split=options.split, target_type="attr")
    # torchvision checks that the folder of images exists. A missing image must not end a run hours later.
    present = set(os.listdir(images))
    absent = [name for name in celeba.filename if name not in present]
    if absent:
        counts = f"({len(absent)} of {len(celeba.filename)} {options.split} images are missing, as {absent[0]})"
        raise missing("celeba", CELEBA_FILES, options, counts)
    files = [images / name for name in celeba.filename]
    box = CELEBA_CROPS[options.crop] or WHOLE
    return ImageFiles(files, options, box, "bicubic" if options.resize == "auto" else options.resize)


def unpack(archive: Path, folder: Path) -> None:
    """Unpack `folder` from the zip archive beside it, completely or not at all, unless the folder exists.

    Raises ValueError for a damaged archive.
    """
    if folder.exists() or not archive.is_file():
        return
    part = folder.with_name(f"{folder.name}.{os.getpid()}.part")
    try:
        with zipfile.ZipFile(archive) as file:
            file.extractall(part)  # checks every file's CRC
        (part / folder.name).rename(folder)
    except (zipfile.BadZipFile, OSError, EOFError, zlib.error) as error:
        if not folder.exists():  # Another process may have been faster.
            raise ValueError(
                f"{shown(archive)} cannot be unpacked ({first_line(error)}): fetch it again"
            ) from None
    finally:
        shutil.rmtree(part, ignore_errors=True)
