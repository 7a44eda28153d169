"""Hold one split's images, in memory or in files, behind one interface: `ImageSource`."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from movae_fast.data.decode import Box, crop_box, decode
from movae_fast.data.find_files import File
from movae_fast.data.prefetch import in_threads
from movae_fast.data.transforms import pick, resize
from movae_fast.names import shown


class ImageSource(Protocol):
    """Give the uint8 images of one split, and one label per image, by their row.

    Derive from it and write `__len__` and `gather`. The rest has defaults, which suit a source that lies in
    memory and says nothing of itself.
    """

    on_host: bool = False  # Rows are wanted on the CPU, since what they name is read or decoded there.
    note: str = ""  # One line for the user: prepared, out of date, left aside.
    skipped: Sequence[str] = ()  # The unreadable files that the source does without, each with the reason.

    def __len__(self) -> int:
        """Return the number of images."""
        raise NotImplementedError

    def gather(
        self,
        rows: Tensor,  # [B] int64
    ) -> tuple[Tensor, Tensor]:  # [B, C, S, S] uint8, [B] int64
        """Return the images of the given rows and their labels, wherever the source keeps them."""
        raise NotImplementedError

    def __getitem__(self, row: int) -> tuple[Tensor, Tensor | int]:  # [C, S, S] uint8, []
        """Return one image and its label."""
        images, labels = self.gather(torch.tensor([row]))
        return images[0], labels[0]

    def to(self, device: torch.device) -> None:
        """Move to the device what is worth moving; by default nothing."""
        return None

    def table(
        self,
        rows: Tensor,  # [B] int64
    ) -> tuple[Tensor, Tensor] | None:  # [N, C, S, S] uint8, [N] int64
        """Return the tables of all images and labels, for the caller to index by `rows`, if the images
        of `rows` need no reading or decoding; else None."""
        return None

    @property
    def factors(self) -> Callable[[Tensor], Tensor]:
        """Return a function from rows [B] to the factors' values [B, F].

        Raises AttributeError where the factors are not known, so that `hasattr` tells.
        """
        raise AttributeError(f"{type(self).__name__} has no factors")


@dataclass(frozen=True)
class ReadOptions:
    """Tell a dataset's reader where its files are, which split to read, and what to make of an image."""

    root: Path
    split: str  # "train" or "test"
    image_size: int
    download: bool
    device: torch.device
    crop: str = "center148"
    resize: str = "auto"
    antialias: bool = False


class Images(ImageSource):
    """Hold images in memory."""

    def __init__(
        self,
        images: Tensor,  # [N, C, S, S] uint8
        labels: Tensor,  # [N] int64
    ) -> None:
        # Convolutions want this layout, and three-channel batches are ready 2 to 8 times sooner on a CPU.
        self.images, self.labels = images.contiguous(memory_format=torch.channels_last), labels

    def __len__(self) -> int:
        return len(self.images)

    def to(self, device: torch.device) -> None:
        """Move all images and labels to the device."""
        self.images, self.labels = self.images.to(device), self.labels.to(device)

    def gather(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Return the images and labels of `rows`, where the images lie."""
        rows = rows.to(self.images.device)
        return pick(self.images, rows), self.labels[rows]

    def table(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Return all images and labels, whichever rows are wanted."""
        return self.images, self.labels


class ImageFiles(ImageSource):
    """Decode image files (or members of tars) as they are asked for.

    Each is cropped to `box` (or to its central square) and resized. Without labels all of them are 0.
    """

    on_host = True

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
        self.skipped: list[str] = []
        self.note = ""

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, row: int) -> tuple[Tensor, int]:
        pixels = torch.from_numpy(decode(self.files[row], self.channels)).permute(2, 0, 1)
        top, left, height, width = crop_box(self.files[row], self.box, *pixels.shape[1:])
        cropped = pixels[:, top : top + height, left : left + width]
        return resize(cropped, self.size, self.mode), self.labels[row]

    def gather(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Decode the files of `rows` in threads."""
        return stack(in_threads(self.__getitem__, rows.tolist()))

    def leave_out(self, reasons: dict[int, str]) -> None:
        """Drop these rows, and remember in `skipped` the reason of each."""
        self.skipped = [f"{shown(self.files[row])}: {shown(why)}" for row, why in reasons.items()]
        self.keep([row for row in range(len(self.files)) if row not in reasons])

    def keep(self, rows: list[int]) -> None:
        """Keep these rows alone, in this order."""
        self.files = [self.files[row] for row in rows]
        self.labels = [self.labels[row] for row in rows]


class Subset(ImageSource):
    """Give `n` evenly spaced rows of a source, in order."""

    def __init__(self, source: ImageSource, n: int) -> None:
        self.source = source
        self.rows = torch.linspace(0, len(source) - 1, n).round().long()
        self.on_host, self.note, self.skipped = source.on_host, source.note, source.skipped

    def __len__(self) -> int:
        return len(self.rows)

    def to(self, device: torch.device) -> None:
        """Move the chosen rows of a set in memory, not the set that they were chosen from."""
        if isinstance(self.source, Images):
            self.source = Images(*self.source.gather(self.rows))
            self.rows = torch.arange(len(self.rows))
        self.source.to(device)
        self.on_host = self.source.on_host
        if not self.on_host:  # The rows of a batch are then looked up on the device.
            self.rows = self.rows.to(device)

    def gather(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Return the images and labels of the subset's `rows`, wherever the source keeps them."""
        return self.source.gather(self.rows.to(rows.device)[rows])


def limited(source: ImageSource, n: int) -> ImageSource:
    """Return `n` evenly spaced rows of the source where it has more, else (or if n is 0) the source itself."""
    if not 0 < n < len(source):
        return source
    subset = Subset(source, n)
    if isinstance(source, Images):
        return Images(*source.gather(subset.rows))
    if not isinstance(source, ImageFiles):
        return subset
    source.keep(subset.rows.tolist())
    return source


def stack(items: Iterator[tuple[Tensor, int]]) -> tuple[Tensor, Tensor]:  # [B, C, S, S], [B]
    """Return single images and labels as a batch."""
    images, labels = zip(*items, strict=True)
    return torch.stack(images), torch.tensor(labels)
