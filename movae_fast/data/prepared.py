"""Read a split from its prepared file if there is one that matches, else from the original files."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from movae_fast.data.datasets import DatasetInfo
from movae_fast.data.memory import RESIDENT_FRACTION, free_memory
from movae_fast.data.prepared_format import (
    OLD_FORMAT,
    Header,
    block_sums,
    damaged_blocks,
    describe_damage,
    labels_agree,
    labels_path,
    map_images,
    preparable,
    prepared_path,
    read_header,
    transform,
)
from movae_fast.data.sources import ImageFiles, ImageSource, ReadOptions
from movae_fast.data.transforms import pick
from movae_fast.data.unreadable import list_hash, unreadable
from movae_fast.names import shown

COPIED = 1024  # images that are copied to a GPU at a time
MEND = "prepare it again (movae data prepare), or delete it and the original files are read"


class Prepared(ImageSource):
    """Give the images of a prepared file, which is memory-mapped or, if it fits there, copied to a GPU.

    Images are compared with their checksums when they are first read, unless `verify` is False. A difference
    raises ValueError, which names the file. `source` gives the original files' factors, if they have any.
    """

    on_host = True
    images: np.ndarray | Tensor  # [N, C, S, S] uint8

    def __init__(
        self, path: Path, header: Header, source: ImageSource | None = None, verify: bool = True
    ) -> None:
        # The factors are those of the original files, unless some of these were left out.
        known = source is not None and hasattr(source, "factors") and not header["skipped"]
        self._factors = source.factors if source is not None and known else None
        self.path, self.header = path, header
        self.labels = torch.from_numpy(np.load(labels_path(path)))
        self.images = map_images(path, header)
        self.skipped: list[str] = header["skipped"]
        self.note = f"prepared {shown(path)}"
        if source is not None and source.note:
            self.note += f"; {source.note}"
        if header["format"] == OLD_FORMAT:
            self.note += "; without checksums of blocks, which `movae data prepare` adds"
            verify = False
        self.sums = block_sums(header) if verify else None
        # The workers of a DataLoader share this: a block that one has checked is checked for all of them, and
        # for the next epoch's workers.
        self.checked = torch.zeros(
            0 if self.sums is None else len(self.sums), dtype=torch.uint8
        ).share_memory_()

    def __len__(self) -> int:
        return len(self.images)

    @property
    def factors(self) -> Callable[[Tensor], Tensor]:
        """Return the original source's function from rows to factor values. Raises AttributeError if it is not
        known."""
        if self._factors is None:
            raise AttributeError(f"{self.path} has no factors")
        return self._factors

    def gather(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Return the images of `rows` and their labels.

        Raises ValueError if a block of images that is read for the first time differs from its checksum.
        """
        if isinstance(self.images, Tensor):
            return pick(self.images, rows), self.labels[rows]
        self.check(rows)
        return torch.from_numpy(self.images[rows.numpy()]), self.labels[rows]

    def check(self, rows: Tensor) -> None:
        """Compare the blocks that contain `rows` [B] with their checksums, unless that was done. Raises
        ValueError."""
        if self.sums is None or isinstance(self.images, Tensor):
            return
        blocks = rows // self.header["block"]
        new = blocks[self.checked[blocks] == 0]
        if not len(new):
            return
        new = new.unique()
        if bad := damaged_blocks(self.images, self.header, self.sums, new.tolist()):
            raise ValueError(f"{shown(self.path)} is damaged ({describe_damage(bad)}): {MEND}")
        self.checked[new] = 1

    def table(self, rows: Tensor) -> tuple[Tensor, Tensor] | None:
        """Return all images and labels if they are on a GPU, else None."""
        return (self.images, self.labels) if isinstance(self.images, Tensor) else None

    def to(self, device: torch.device) -> None:
        """Copy the images to a GPU if it has room for them; on a CPU they stay memory-mapped."""
        mapped = self.images
        if device.type == "cpu" or isinstance(mapped, Tensor):
            return
        if mapped.nbytes <= RESIDENT_FRACTION * free_memory(device):
            images = torch.empty(
                mapped.shape, dtype=torch.uint8, device=device, memory_format=torch.channels_last
            )
            for at in range(0, len(mapped), COPIED):
                self.check(torch.arange(at, min(at + COPIED, len(mapped))))
                images[at : at + COPIED] = torch.from_numpy(mapped[at : at + COPIED].copy())
            self.images, self.labels, self.on_host = images, self.labels.to(device), False


def open_split(
    info: DatasetInfo, options: ReadOptions, on_bad_image: str = "error", verify: bool = True
) -> ImageSource:
    """Return a split as an image source: its prepared file if there is one that matches, else its original
    files.

    on_bad_image: "skip" leaves unreadable files out, and `source.skipped` names them. verify: check a prepared
    file's images as they are read. A prepared file whose original files have changed is not used, which
    `source.note` says. Raises ValueError for a prepared file that does not agree with its header.
    """
    path = prepared_path(info.name, options)
    header = read_header(path)
    try:
        source = info.read(options)
    except FileNotFoundError:
        if header is None:
            raise
        return Prepared(path, header, verify=verify)  # The original files need not be kept.
    if header is not None:
        if matches(path, header, source):
            if header["skipped"] and on_bad_image == "error":
                raise ValueError(
                    f"{shown(path)} leaves out {len(header['skipped'])} unreadable images "
                    f"({shown(header['skipped'][0])}): give --on_bad_image skip, or mend them and prepare again"
                )
            return Prepared(path, header, source, verify)
        _note(source, f"{shown(path)} is out of date (the original files changed); reading those")
    elif path.exists():
        _note(source, f"{shown(path)} has no header and is not used: prepare again")
    if on_bad_image == "skip" and isinstance(source, ImageFiles):
        leave_out_unreadable(source, info.name, options)
    return source


def matches(path: Path, header: Header, source: ImageSource) -> bool:
    """Return whether a prepared file was made from the present original files, with the same transform."""
    original = preparable(source)
    same = header["files"] == list_hash(original.files) and header["transform"] == transform(original)
    return same and bool(header["skipped"] or labels_agree(path, original))


def leave_out_unreadable(source: ImageFiles, name: str, options: ReadOptions) -> None:
    """Remove the files that cannot be read from the source. Raises ValueError if none remains."""
    source.leave_out(unreadable(source))
    if not source.files:
        raise ValueError(f"--dataset {name}: not one {options.split} image can be read ({source.skipped[0]})")


def _note(source: ImageSource, text: str) -> None:
    source.note = "; ".join(filter(None, (source.note, text)))
