"""Prepared sets: images decoded once into a file of uint8 [N, C, S, S] with a JSON header, mapped afterwards.

The header is written last and says what the file must be: its shape, the transform, the list of original files
it was made from, its checksum. Until then there are `.part` files, from which an interrupted preparation goes
on.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from movae_fast.data.grids import GridImages
from movae_fast.data.machine import RESIDENT_SHARE, free_memory, in_threads
from movae_fast.data.sets import DatasetInfo, Source
from movae_fast.data.sources import ImageFiles, ReadOptions
from movae_fast.data.survey import list_hash, unreadable
from movae_fast.data.transforms import pick
from movae_fast.files import file_digest, replacing, sync

FORMAT = "movae uint8 images 1"
CHUNK = 1024  # images between two durable states of a preparation


class Prepared:
    """An image source that maps a prepared file; rows are indexed on the host, or on a GPU where it fits."""

    on_host = True
    images: np.ndarray | Tensor

    def __init__(self, path: Path, header: dict[str, Any], source: Any = None) -> None:
        if hasattr(source, "factors") and not header["skipped"]:
            self.factors = source.factors
        self.header, self.labels = header, torch.from_numpy(np.load(path.with_suffix(".labels.npy")))
        self.images = np.memmap(path, np.uint8, "r", shape=tuple(header["shape"]))
        self.skipped: list[str] = header["skipped"]
        self.note = f"prepared {path}"

    def __len__(self) -> int:
        return len(self.images)

    def gather(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Rows [B] to images [B, C, S, S] uint8 and labels [B]."""
        if isinstance(self.images, Tensor):
            return pick(self.images, rows), self.labels[rows]
        return torch.from_numpy(self.images[rows.numpy()]), self.labels[rows]

    def table(self, rows: Tensor) -> tuple[Tensor, Tensor] | None:
        """All images and labels where they lie on a GPU."""
        return (self.images, self.labels) if isinstance(self.images, Tensor) else None

    def to(self, device: torch.device) -> None:
        """Copy the set to a GPU that has room for it; on a CPU it stays mapped."""
        mapped = self.images
        if device.type == "cpu" or isinstance(mapped, Tensor):
            return
        if mapped.nbytes <= RESIDENT_SHARE * free_memory(device):
            self.images = torch.empty(
                mapped.shape, dtype=torch.uint8, device=device, memory_format=torch.channels_last
            )
            for at in range(0, len(mapped), CHUNK):
                self.images[at : at + CHUNK] = torch.from_numpy(mapped[at : at + CHUNK].copy())
            self.labels, self.on_host = self.labels.to(device), False


def prepared_path(name: str, options: ReadOptions) -> Path:
    root = options.root
    if root.is_file():  # a list of files
        name, root = f"{name}-{root.stem}", root.parent
    stem = f"{name}-{options.split}-{options.image_size}-{options.crop}-{options.resize}"
    return root / "prepared" / f"{stem}.u8"


def open_split(info: DatasetInfo, options: ReadOptions, on_bad_image: str = "error") -> Any:
    """A split's source: its prepared file where there is one that matches, else the original files.

    `skip` leaves unreadable image files out (`source.skipped` names them). A prepared file that is not what its
    header says is a ValueError; one that the original files have outgrown is left alone and noted.
    """
    path = prepared_path(info.name, options)
    header = read_header(path)
    try:
        source: Any = info.read(options)
    except FileNotFoundError:
        if header is None:
            raise
        return Prepared(path, header)  # the original files may be elsewhere by now
    if header is not None:
        if header["files"] == list_hash(source.files) and header["transform"] == transform(source):
            if header["skipped"] and on_bad_image == "error":
                raise ValueError(
                    f"{path} leaves out {len(header['skipped'])} unreadable images ({header['skipped'][0]}): "
                    "give --on_bad_image skip, or mend them and prepare again"
                )
            return Prepared(path, header, source)
        source.note = f"{path} is out of date (the original files changed); reading those"
    if on_bad_image == "skip" and isinstance(source, ImageFiles):
        leave_out_unreadable(source, info.name, options)
    return source


def leave_out_unreadable(source: ImageFiles, name: str, options: ReadOptions) -> None:
    source.leave_out(unreadable(source.files, source.channels))
    if not source.files:
        raise ValueError(f"--dataset {name}: not one {options.split} image can be read ({source.skipped[0]})")


def transform(source: Source) -> dict[str, Any]:
    """What was done to an original image, as a header keeps it."""
    if isinstance(source, ImageFiles):
        box = list(source.box) if source.box else None
        return {"size": source.size, "resize": source.mode, "box": box, "channels": source.channels}
    assert isinstance(source, GridImages)
    return {"size": source.size, "resize": source.mode}


def read_header(path: Path) -> dict[str, Any] | None:
    """The header of a prepared file, None if there is none. Raises ValueError where the two disagree."""
    at = path.with_suffix(".json")
    if not at.is_file():
        return None
    try:
        header = json.loads(at.read_text())
        if header["format"] != FORMAT:
            raise ValueError(f"its format is {header['format']!r}, expected {FORMAT!r}")
        expected = int(np.prod(header["shape"]))
        found = path.stat().st_size if path.exists() else 0
        if found != expected:
            raise ValueError(f"{found:,} bytes, expected {expected:,} for images {header['shape']}")
        labels = np.load(path.with_suffix(".labels.npy"), mmap_mode="r").shape
        if labels != (header["shape"][0],):
            raise ValueError(f"labels {list(labels)}, expected [{header['shape'][0]}]")
    except (ValueError, KeyError, TypeError, OSError, EOFError) as error:
        raise ValueError(
            f"{path} is not a whole prepared file ({error}): delete it and prepare again"
        ) from None
    return header


def checksum(path: Path) -> str:
    return file_digest(path, hashlib.blake2b(digest_size=16))


def prepare(
    info: DatasetInfo,
    options: ReadOptions,
    on_bad_image: str = "error",
    decoder: str = "pillow",
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> tuple[Path, str]:
    """Write a split's prepared file; its path and "written", "continued" or "current".

    Stopped at any moment, it goes on from the last whole chunk. Raises ValueError for a set that lies in memory
    anyway, or an unreadable image (unless `on_bad_image` is skip).
    """
    source = info.read(options)
    if not isinstance(source, ImageFiles | GridImages):
        raise ValueError(f"{info.name} lies in memory as uint8 once it is read: there is nothing to prepare")
    path = prepared_path(info.name, options)
    header: dict[str, Any] = {
        "format": FORMAT,
        "dataset": info.name,
        "split": options.split,
        "transform": transform(source),
        "decoder": decoder if isinstance(source, ImageFiles) else "none",
        "files": list_hash(source.files),
        "skipped": [],
    }
    if on_bad_image == "skip" and isinstance(source, ImageFiles):
        leave_out_unreadable(source, info.name, options)
        header["skipped"] = source.skipped
    header["shape"] = [len(source), info.channels, options.image_size, options.image_size]
    try:
        old = read_header(path)
    except ValueError:
        old = None  # written anew
    if old is not None and all(old[k] == v for k, v in header.items()):
        return path, "current"
    done = _write_images(path, header, source, progress)
    labels = path.with_suffix(".labels.npy")
    with replacing(labels, durable=True) as file:
        np.save(file, np.asarray(_labels(source), np.int64))
    header["checksum"] = checksum(path.with_suffix(".u8.part"))
    # No header stands beside data that are not its own.
    path.with_suffix(".json").unlink(missing_ok=True)
    path.with_suffix(".u8.part").replace(path)
    _write_json(path.with_suffix(".json"), header)
    path.with_suffix(".part.json").unlink()
    return path, "continued" if done else "written"


def _write_images(path: Path, header: dict[str, Any], source: Any, progress: Callable[[int, int], None]) -> int:
    """Append what is missing to the .part file; the number of images that were there already."""
    path.parent.mkdir(parents=True, exist_ok=True)
    data, state = path.with_suffix(".u8.part"), path.with_suffix(".part.json")
    done, item = 0, int(np.prod(header["shape"][1:]))
    if state.is_file() and data.is_file():
        earlier = json.loads(state.read_text())
        if earlier["header"] == header and data.stat().st_size >= earlier["done"] * item:
            done = earlier["done"]
    with data.open("r+b" if done else "wb") as file:
        file.truncate(done * item)
        file.seek(0, os.SEEK_END)
        before, written, at = done, 0, done
        progress(at, len(source))
        for images in _decoded(source, header["decoder"], done):
            file.write(images.contiguous().numpy().data)
            at, written = at + len(images), written + len(images)
            progress(at, len(source))
            if written >= CHUNK:
                sync(file)
                _write_json(state, {"header": header, "done": at})
                written = 0
        sync(file)
        _write_json(state, {"header": header, "done": at})
    return before


def _decoded(source: Any, decoder: str, start: int) -> Iterator[Tensor]:
    """uint8 [B, C, S, S] of rows start, start + 1, …"""
    if decoder == "dali":
        from movae_fast.data.dali import DaliLoader

        loader = DaliLoader(source, 256, torch.device("cpu"), train=False)
        for _, (images, _) in loader.batches(torch.arange(start, len(source)), 0):
            yield images
    elif isinstance(source, ImageFiles):
        for image, _ in in_threads(source.__getitem__, range(start, len(source))):
            yield image[None]
    else:
        for rows in torch.arange(start, len(source)).split(CHUNK):
            yield source.gather(rows)[0]


def _labels(source: Any) -> Any:
    if isinstance(source, ImageFiles):
        return source.labels
    shape = next(i for i, name in enumerate(source.grid.names) if name.endswith("shape"))
    return source.factors(torch.arange(len(source)))[:, shape]


def _write_json(path: Path, record: dict[str, Any]) -> None:
    with replacing(path, durable=True) as file:
        file.write(json.dumps(record, indent=1).encode())
