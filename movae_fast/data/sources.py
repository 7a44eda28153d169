"""Image sources: where a split's uint8 images come from, in memory or in files.

A source has `__len__` and either `gather(rows) -> (uint8 images [B, C, S, S], labels [B])`, or, where files
must be decoded, `source[i] -> (uint8 image [C, S, S], label)`. `to(device)`, where there is one, moves it;
`table(rows)`, where there is one, is what `gather` indexes: all images and labels on that device, or None.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from movae_fast.data.decode import Box, crop_box, decode
from movae_fast.data.find_files import File
from movae_fast.data.prefetch import in_threads
from movae_fast.data.transforms import pick, resize
from movae_fast.names import shown


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
        # As convolutions want them; for three channels on a CPU a batch is then ready 2 to 8 times sooner.
        self.images, self.labels = images.contiguous(memory_format=torch.channels_last), labels

    def __len__(self) -> int:
        return len(self.images)

    def to(self, device: torch.device) -> None:
        self.images, self.labels = self.images.to(device), self.labels.to(device)

    def gather(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Rows [B] to images [B, C, S, S] uint8 and labels [B]."""
        rows = rows.to(self.images.device)
        return pick(self.images, rows), self.labels[rows]

    def table(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """All images and labels, whichever rows are wanted."""
        return self.images, self.labels


class ImageFiles(torch.utils.data.Dataset):
    """Image files (or members of tars), cropped to `box` (or to the central square) and resized as they are
    read; labels or 0.
    """

    def __init__(
        self,
        files: Sequence[File],
        options: ReadOptions,
        box: Box | None,
        mode: str,
        labels: Sequence[int] | None = None,
        channels: int = 3,
    ) -> None:
        self.files, self.box, self.size, self.channels = list(files), box, options.image_size, channels
        self.mode = mode
        self.labels = list(labels) if labels is not None else [0] * len(self.files)
        self.skipped: list[str] = []  # what was left out, with the reason
        self.note = ""

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, i: int) -> tuple[Tensor, int]:
        pixels = torch.from_numpy(decode(self.files[i], self.channels)).permute(2, 0, 1)
        top, left, height, width = crop_box(self.files[i], self.box, *pixels.shape[1:])
        return resize(pixels[:, top : top + height, left : left + width], self.size, self.mode), self.labels[i]

    def leave_out(self, bad: dict[int, str]) -> None:
        """Drop the rows of `bad`, row -> why."""
        self.skipped = [f"{shown(self.files[i])}: {shown(why)}" for i, why in bad.items()]
        self.keep([i for i in range(len(self.files)) if i not in bad])

    def keep(self, rows: list[int]) -> None:
        """Have these rows alone, in this order."""
        self.files = [self.files[i] for i in rows]
        self.labels = [self.labels[i] for i in rows]


class Subset:
    """Evenly spaced `n` rows of a source, in order."""

    def __init__(self, source: Any, n: int) -> None:
        self.source = source
        self.rows = torch.linspace(0, len(source) - 1, n).round().long()

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def on_host(self) -> bool:
        return getattr(self.source, "on_host", not hasattr(self.source, "gather"))

    def to(self, device: torch.device) -> None:
        """Move the rows that are left, not the set that they were taken from."""
        if isinstance(self.source, Images):
            self.source = Images(*self.source.gather(self.rows))
            self.rows = torch.arange(len(self.rows))
        if hasattr(self.source, "to"):
            self.source.to(device)
        if not self.on_host:  # a batch's rows are looked up where they are wanted
            self.rows = self.rows.to(device)

    def gather(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Rows [B] of the subset to images and labels, wherever the source keeps them."""
        rows = self.rows.to(rows.device)[rows]
        if hasattr(self.source, "gather"):
            return self.source.gather(rows)
        return stack(in_threads(self.source.__getitem__, rows.tolist()))


def limited(source: Any, n: int) -> Any:
    """The source itself, or evenly spaced `n` rows of it where it has more (0: all)."""
    if not 0 < n < len(source):
        return source
    subset = Subset(source, n)
    if isinstance(source, Images):
        return Images(*source.gather(subset.rows))
    if not isinstance(source, ImageFiles):
        return subset
    source.keep(subset.rows.tolist())
    return source


def stack(items: Iterator[tuple[Tensor, int]]) -> tuple[Tensor, Tensor]:
    images, labels = zip(*items, strict=True)
    return torch.stack(images), torch.tensor(labels)


def in_memory(images: Any, labels: Any, options: ReadOptions) -> Images:
    """uint8 [N, H, W] or [N, H, W, 3] with labels [N], brought to the wanted side."""
    pixels = torch.as_tensor(np.asarray(images))
    if pixels.dim() == 3:  # [N, H, W]
        pixels = pixels[:, None]
    elif pixels.shape[-1] == 3:  # [N, H, W, 3]
        pixels = pixels.permute(0, 3, 1, 2)
    pixels = resize(pixels.contiguous(), options.image_size, options.resize)
    return Images(pixels, torch.as_tensor(np.asarray(labels)).long())


def missing(name: str, files: str, options: ReadOptions, error: Exception | str) -> FileNotFoundError:
    """What is not there, and what to put where."""
    how = "" if options.download else " (--download false: nothing was fetched)"
    return FileNotFoundError(
        f"--dataset {name}: not found or damaged in --data_dir {shown(options.root)}{how}; wanted there: "
        f"{files}. {shown(error)}"
    )
