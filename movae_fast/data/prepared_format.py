"""Define the files of a prepared split: their names, their header, and how they are checked.

A prepared split is a file of images, uint8 [N, C, S, S], a file of labels and a JSON header. The header is
written last. It states the shape, the transform, a digest of the list of original files, and checksums of
blocks of images, of the labels and of the header itself.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import re
import zlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from movae_fast.data.datasets.factor_grids import GridImages
from movae_fast.data.find_files import PREPARED
from movae_fast.data.sources import ImageFiles, ImageSource, ReadOptions
from movae_fast.files import file_digest
from movae_fast.names import first_line, shown

FORMAT = "movae uint8 images 2"
OLD_FORMAT = "movae uint8 images 1"  # with one checksum of all images, none of labels
# Bytes that share a checksum, in whole images. They are few, since a shuffled batch of B images at first reads
# B blocks.
BLOCK = 1 << 16

Header = dict[str, Any]  # what JSON makes of the header
Preparable = ImageFiles | GridImages  # the sources that decoding once makes faster


def prepared_path(name: str, options: ReadOptions) -> Path:
    """Return the path of a split's prepared images; the labels and the header have the same stem."""
    folder, stem = _place(name, options)
    return folder / f"{stem}-{options.split}-{options.image_size}-{options.crop}-{options.resize}.u8"


def labels_path(path: Path) -> Path:
    """Return the path of the labels of the prepared images at `path`."""
    return path.with_suffix(".labels.npy")


def header_path(path: Path) -> Path:
    """Return the path of the header of the prepared images at `path`."""
    return path.with_suffix(".json")


def _place(name: str, options: ReadOptions) -> tuple[Path, str]:
    """Return the folder of a dataset's prepared files, and the beginning of their names."""
    root = options.root
    if os.path.isfile(root):  # a list of files, or a tar
        return root.parent / PREPARED, f"{name}-{root.stem}"
    return root / PREPARED, name


def prepared_files(name: str, options: ReadOptions) -> list[Path]:
    """Return the prepared image files of a split, for all sizes and transforms, complete or not."""
    folder, stem = _place(name, options)
    ours = re.compile(rf"{re.escape(stem)}-{options.split}-[0-9]+-[^.]*\.(u8|json)")
    beside = folder.iterdir() if folder.is_dir() else iter(())
    return sorted({path.with_suffix(".u8") for path in beside if ours.fullmatch(path.name)})


def preparable(source: ImageSource) -> Preparable:
    """Return the source, as a type that can be prepared. Raises TypeError for other types."""
    if not isinstance(source, Preparable):
        raise TypeError(f"{type(source).__name__} cannot be prepared")
    return source


def transform(source: Preparable) -> Header:
    """Return the settings with which original images become prepared ones (size, resampling, crop), for the
    header."""
    if isinstance(source, ImageFiles):
        box = list(source.box) if source.box else None
        return {"size": source.size, "resize": source.mode, "box": box, "channels": source.channels}
    return {"size": source.size, "resize": source.mode}


def labels_agree(path: Path, source: Preparable) -> bool:
    """Return whether a prepared file's labels equal those of the original files; a new class folder changes the
    latter."""
    return np.array_equal(np.load(labels_path(path)), labels_array(source))


def labels_array(source: Preparable) -> np.ndarray:  # [N] int64
    """Return the labels of the original files as an array."""
    return np.asarray(source.labels, np.int64)


def read_header(path: Path) -> Header | None:
    """Return the header of the prepared file at `path`, or None if it has none.

    Raises ValueError if the header or the labels are damaged, or if the size of the image file is wrong.
    """
    if not header_path(path).is_file():
        return None
    try:
        header = json.loads(header_path(path).read_text())
        if header["format"] not in (FORMAT, OLD_FORMAT):
            raise ValueError(f"its format is {header['format']!r}, expected {FORMAT!r}")
        expected = int(np.prod(header["shape"]))
        size = path.stat().st_size if path.exists() else 0
        if size != expected:
            raise ValueError(f"{size:,} bytes, expected {expected:,} for images {header['shape']}")
        data = labels_path(path).read_bytes()
        if header["format"] == FORMAT:
            _check_sums(header, data)
        elif absent := {"checksum", "files", "transform", "skipped"} - header.keys():
            raise ValueError(f"the header has no {', '.join(sorted(absent))}")
        labels = np.load(io.BytesIO(data)).shape
        if labels != (header["shape"][0],):
            raise ValueError(f"labels {list(labels)}, expected [{header['shape'][0]}]")
    except Exception as error:  # Damage may raise anything.
        why = shown(first_line(error))[:200]
        raise ValueError(
            f"{shown(path)} is not a whole prepared file ({why}): delete it and prepare again"
        ) from None
    return header


def _check_sums(header: Header, labels: bytes) -> None:
    if sealed(header)["header_crc32"] != header["header_crc32"]:
        raise ValueError("the header differs from its checksum")
    if zlib.crc32(labels) != header["labels_crc32"]:
        raise ValueError("the labels differ from their checksum")


def sealed(header: Header) -> Header:
    """Return the header with a checksum of all its other entries added."""
    rest = {key: value for key, value in header.items() if key != "header_crc32"}
    return rest | {"header_crc32": zlib.crc32(json.dumps(rest, sort_keys=True).encode())}


def map_images(path: Path, header: Header) -> np.ndarray:  # [N, C, S, S] uint8
    """Map the images of a prepared file into memory; they are read from the disk when they are used."""
    return np.memmap(path, np.uint8, "r", shape=tuple(header["shape"]))


def images_per_block(shape: list[int]) -> int:
    """Return the number of images, of a set [N, C, S, S], that share a checksum."""
    return max(1, BLOCK // int(np.prod(shape[1:])))


def block_sums(header: Header) -> np.ndarray:  # [blocks] uint32
    """Return the CRC-32 checksum of each block of images, as stored in the header."""
    return np.frombuffer(bytes.fromhex(header["blocks_crc32"]), ">u4")


def damaged_blocks(
    images: np.ndarray,  # [N, C, S, S] uint8
    header: Header,
    sums: np.ndarray,  # [blocks] uint32
    blocks: Iterable[int],
) -> list[tuple[int, int]]:
    """Return, for each of the `blocks` that differs from its checksum, the numbers of its first and last
    image."""
    size = header["block"]
    bad = (b for b in blocks if zlib.crc32(images[b * size : (b + 1) * size].data) != sums[b])
    return [(b * size, min((b + 1) * size, len(images)) - 1) for b in bad]


def describe_damage(bad: list[tuple[int, int]]) -> str:
    """Return a phrase for an error that names the first damaged images, from the result of `damaged_blocks`."""
    ranges = [f"{first:,} to {last:,}" for first, last in bad[:3]]
    return f"checksums differ at images {', '.join(ranges)}{', …' * (len(bad) > 3)}"


def damage(path: Path, header: Header) -> str:
    """Read all images of a prepared file; return what is wrong with them, or "" if nothing is."""
    if header["format"] == OLD_FORMAT:
        return "" if checksum(path) == header["checksum"] else "its checksum differs"
    sums = block_sums(header)
    bad = damaged_blocks(map_images(path, header), header, sums, range(len(sums)))
    return describe_damage(bad) if bad else ""


def checksum(path: Path) -> str:
    """Return the checksum of the whole image file, which headers of the old format store."""
    return file_digest(path, hashlib.blake2b(digest_size=16))
