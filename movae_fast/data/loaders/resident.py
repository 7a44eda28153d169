"""Keep a whole dataset on the device as uint8, so that giving a batch is one indexing operation."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator
from contextlib import closing
from functools import cached_property
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from movae_fast.data.loaders.loader import Loader, LoaderOptions
from movae_fast.data.prefetch import in_threads, prefetched
from movae_fast.data.sources import ImageFiles, ImageSource, stack
from movae_fast.data.transforms import batch_of, pick
from movae_fast.own_code import with_own_code

if TYPE_CHECKING:
    from typing_extensions import Unpack  # in typing from Python 3.11 on


class ResidentLoader(Loader):
    """Index images that lie on the device as uint8, or are rendered there.

    Image files are decoded in the first epoch, on all processors, and then stay on the device. A prepared file
    stays memory-mapped.

    On CUDA indexing, mirroring and normalising are one compiled kernel, unless `compiled` is False or images
    are binarized. On a CPU they are not compiled: there the kernel took 0.6 to 0.8 of the time of `pick` and
    `finish` without mirroring, but 3 to 20 times as long with it, since it goes byte by byte where those copy
    whole images.
    """

    def __init__(
        self,
        source: ImageSource,
        batch_size: int,
        device: torch.device,
        compiled: bool = True,
        **options: Unpack[LoaderOptions],
    ) -> None:
        if isinstance(source, ImageFiles):
            source = DecodedFiles(source, device)
        super().__init__(source, batch_size, device, **options)
        source.to(device)
        self.compiled = compiled and device.type == "cuda"

    def finished(
        self, rows: Tensor, start: int, flip: Tensor | None, epoch: int | None
    ) -> Generator[tuple[Tensor, Tensor]]:
        """Yield what `Loader.finished` yields; images on a GPU are indexed there, without waiting for the
        device."""
        fused = self.compiled and self.binarizer.mode == "none"
        table = self.source.table(rows) if fused else None
        if table is None:
            yield from super().finished(rows, start, flip, epoch)
            return
        rows, flip = rows.to(self.device), None if flip is None else flip.to(self.device)
        for at in range(start * self.batch_size, len(rows), self.batch_size):
            here = slice(at, at + self.batch_size)
            mirrored = None if flip is None else flip[here]
            yield self.batch_of(*table, rows[here], mirrored, self.normalize, self.bits)

    @cached_property
    def batch_of(self) -> Callable[..., tuple[Tensor, Tensor]]:
        """Return this loader's own compiled copy of `batch_of`, so that other loaders' shapes do not recompile
        it."""
        return compiled_batch_of()

    def batches(self, rows: Tensor, start: int) -> Iterator[tuple[int, tuple[Tensor, Tensor]]]:
        """Yield what `Loader.batches` yields; files are decoded or read two batches ahead of the training
        step."""
        starts = range(start * self.batch_size, len(rows), self.batch_size)
        if not self.source.on_host:
            rows = rows.to(self.device)
            for at in starts:
                yield at, self.source.gather(rows[at : at + self.batch_size])
            return
        gathered = (self._gather(rows[at : at + self.batch_size]) for at in starts)
        with closing(prefetched(gathered, depth=2)) as ready:
            for at, (images, labels) in zip(starts, ready, strict=True):
                yield at, (images.to(self.device, non_blocking=True), labels.to(self.device, non_blocking=True))

    def _gather(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        images, labels = self.source.gather(rows)
        if self.device.type == "cuda" and not images.is_cuda:  # Copies from pinned memory are asynchronous.
            images = images.pin_memory()
        return images, labels.pin_memory() if self.device.type == "cuda" else labels


def compiled_batch_of() -> Callable[..., tuple[Tensor, Tensor]]:
    """Return a compiled copy of `batch_of`, which torch.compile counts separately from other copies."""
    return torch.compile(with_own_code(batch_of), fullgraph=True)


class DecodedFiles(ImageSource):
    """Decode image files at their first use, and keep them on the device as uint8 afterwards.

    Raises ValueError if the device's memory cannot hold all of them.
    """

    on_host = True  # The host knows which rows are wanted, without asking the device.

    def __init__(self, source: ImageFiles, device: torch.device) -> None:
        self.source, self.device = source, device
        self.note, self.skipped = source.note, source.skipped
        shape = (len(source), source.channels, source.size, source.size)
        try:
            self.images = torch.empty(
                shape, dtype=torch.uint8, device=device, memory_format=torch.channels_last
            )
        except RuntimeError:
            raise ValueError(
                f"--loader resident: {len(source):,} images take {set_bytes(source) / 1e9:.1f} GB on {device}, "
                "more than there is: use --loader dali or torch, or prepare them (movae data prepare)"
            ) from None
        self.labels = torch.tensor(source.labels)
        self.present = torch.zeros(len(source), dtype=torch.bool)  # [N], which images have been decoded

    def __len__(self) -> int:
        return len(self.source)

    def gather(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Return the images of `rows` on the device, and their labels; `rows` and labels are on the host."""
        new = rows[~self.present[rows]]
        if len(new):
            items = in_threads(self.source.__getitem__, new.tolist())
            self.images[new.to(self.device)] = stack(items)[0].to(self.device)
            self.present[new] = True
        return pick(self.images, rows.to(self.device)), self.labels[rows]

    def table(self, rows: Tensor) -> tuple[Tensor, Tensor] | None:
        """Return all images and labels on the device if every image of `rows` has been decoded, else None."""
        return (self.images, self.labels.to(self.device)) if bool(self.present[rows].all()) else None


def set_bytes(source: ImageFiles) -> int:
    """Return the number of bytes that all images take once decoded."""
    return len(source) * source.channels * source.size**2
