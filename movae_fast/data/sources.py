"""Give the images of one split through one interface, `ImageSource`, whether they are in memory or in files."""

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
    """Give the uint8 images of one split, and one label per image, by row number.

    A source derives from this class and implements `__len__` and `gather`. The defaults of everything else suit
    images in memory.
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
        """Return the images of the given rows and their labels, on the device where the source keeps them."""
        raise NotImplementedError

    def __getitem__(self, row: int) -> tuple[Tensor, Tensor | int]:  # [C, S, S] uint8, []
        """Return one image and its label."""
        images, labels = self.gather(torch.tensor([row]))
        return images[0], labels[0]

    def to(self, device: torch.device) -> None:
        """Move the images to the device, if that is worthwhile for this kind of source; by default nothing is
        moved."""
        return None

    def table(
        self,
        rows: Tensor,  # [B] int64
    ) -> tuple[Tensor, Tensor] | None:  # [N, C, S, S] uint8, [N] int64
        """Return the tensors of all images and all labels, for the caller to index, if the images of `rows`
        need no reading or decoding; else None."""
        return None

    @property
    def factors(self) -> Callable[[Tensor], Tensor]:
        """Return a function from rows [B] to the ground-truth factor values [B, F].

        Raises AttributeError if the factors are not known, so that `hasattr` can be used.
        """
        raise AttributeError(f"{type(self).__name__} has no factors")


@dataclass(frozen=True)
class ReadOptions:
    """Tell a dataset's reader where the files are, which split to read, and how to crop and resize the
    images."""

    root: Path
    split: str  # "train" or "test"
    image_size: int
    download: bool
    device: torch.device
    crop: str = "center148"
    resize: str = "auto"
    antialias: bool = False


class Images(ImageSource):
    """Hold the images of a split in memory."""

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
        """Return the images and labels of `rows`, on the images' device."""
        rows = rows.to(self.images.device)
        return pick(self.images, rows), self.labels[rows]

    def table(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Return the tensors of all images and all labels; `rows` does not matter."""
        return self.images, self.labels


class ImageFiles(ImageSource):
    """Decode image files, or files inside tars, when they are asked for.

    Each image is cropped to `box` (None: to its central square) and resized by `mode`. If no labels are given,
    all are 0.
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
        """Decode the files of `rows` in threads; return the images and their labels."""
        return stack(in_threads(self.__getitem__, rows.tolist()))

    def leave_out(self, reasons: dict[int, str]) -> None:
        """Remove the rows in `reasons`, and list them with their reasons in `skipped`."""
        self.skipped = [f"{shown(self.files[row])}: {shown(why)}" for row, why in reasons.items()]
        self.keep([row for row in range(len(self.files)) if row not in reasons])

    def keep(self, rows: list[int]) -> None:
        """Keep only the given rows, in this order."""
        self.files = [self.files[row] for row in rows]
        self.labels = [self.labels[row] for row in rows]


class Subset(ImageSource):
    """Give `n` evenly spaced rows of another source, in order."""

    def __init__(self, source: ImageSource, n: int) -> None:
        self.source = source
        self.rows = torch.linspace(0, len(source) - 1, n).round().long()
        self.on_host, self.note, self.skipped = source.on_host, source.note, source.skipped

    def __len__(self) -> int:
        return len(self.rows)

    def to(self, device: torch.device) -> None:
        """Move the subset's images to the device; of a source in memory only these, not the whole source."""
        if isinstance(self.source, Images):
            self.source = Images(*self.source.gather(self.rows))
            self.rows = torch.arange(len(self.rows))
        self.source.to(device)
        self.on_host = self.source.on_host
        if not self.on_host:  # The rows of a batch are then looked up on the device.
            self.rows = self.rows.to(device)

    def gather(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Return the images and labels of the subset's `rows`, on the device where the source keeps them."""
        return self.source.gather(self.rows.to(rows.device)[rows])


def limited(source: ImageSource, n: int) -> ImageSource:
    """Return `n` evenly spaced rows of the source; the source itself if n is 0 or not less than its length."""
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
    """Combine single images and labels into a batch."""
    images, labels = zip(*items, strict=True)
    return torch.stack(images), torch.tensor(labels)
