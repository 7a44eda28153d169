"""Loaders under one interface: `epoch(number, start)` yields (images, labels) on the device.

Order and mirroring of an epoch are a function of the seed, the epoch's number and nothing else, so a position
is two integers, a resumed epoch continues exactly, and all loaders give the same batches (`dali`'s pixels are
its own decoder's, within a grey level or two). An iterator's images are float32 [B, C, S, S] in the model's
data range; labels are int64 [B].

Several processes share the global batches of one: changing their number on resume, with the global batch kept,
goes on with the same images in the same steps. The last images of an epoch that fill no global batch are left
out of it, and another epoch's shuffle leaves out others; or the batch is filled up (`pad`) with images of the
same epoch again, which count nothing (`share_of`). Evaluation counts every image exactly once.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator
from contextlib import closing
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from movae_fast.data.prefetch import ahead, in_threads
from movae_fast.data.sources import ImageFiles, stack
from movae_fast.data.transforms import Binarizer, batch_of, finish, pick
from movae_fast.own_code import with_own_code


@dataclass
class Epoch:
    """One epoch's order: rows of the source and which of them to mirror."""

    rows: Tensor  # [N] int64, CPU
    flip: Tensor | None  # [N] bool, CPU


class Loader:
    """What both loaders share: the plan of an epoch, and from uint8 to the model's data range."""

    def __init__(
        self,
        source: Any,
        batch_size: int,
        device: torch.device,
        *,
        train: bool,
        seed: int = 0,
        flip: bool = False,
        normalize: bool = False,
        binarizer: Binarizer | None = None,
        rank: int = 0,
        world: int = 1,
        pad: bool = False,
    ) -> None:
        self.source, self.batch_size, self.device = source, batch_size, device
        self.binarizer = binarizer or Binarizer("none", "train" if train else "test", seed)
        self.rank, self.world = rank, world
        self.train, self.seed, self.flip, self.normalize = train, seed, flip and train, normalize
        self.why = ""  # this loader and not another, for whoever asked for `auto`
        self.pad = pad and train
        if train and not pad and len(source) < batch_size * world:
            processes = f" on {world} processes" if world > 1 else ""
            raise ValueError(
                f"--batch_size {batch_size}{processes} is more than the {len(source)} training images: the "
                "last, incomplete batch of an epoch is dropped, so an epoch would hold none (--last_batch pad "
                "fills it)"
            )
        if self.pad:
            self.shares = torch.ones(batch_size, device=device), self._last_share().to(device)

    @property
    def note(self) -> str:
        """What is worth knowing about the source: prepared, out of date."""
        return getattr(getattr(self.source, "source", self.source), "note", "")

    @property
    def left_out(self) -> list[str]:
        """The unreadable files that the source does without, each with the reason."""
        return getattr(getattr(self.source, "source", self.source), "skipped", [])

    def __len__(self) -> int:
        """Batches an epoch, of this process: of the incomplete last one, see above; evaluation keeps it."""
        if self.train:
            return (len(self.source) + self.pad * (self.global_batch - 1)) // self.global_batch
        every = -(-len(self.source) // self.batch_size)
        return len(range(self.rank, every, self.world))

    @property
    def global_batch(self) -> int:
        return self.batch_size * self.world

    def share_of(self, batch: int) -> Tensor | None:
        """How often each image [B] of an epoch's batch counts, 1 on average over all processes' images.

        None where every batch is of images that count; else images that fill up the last batch count 0.
        """
        if not self.pad:
            return None
        return self.shares[batch == len(self) - 1]

    def _last_share(self) -> Tensor:
        first = (len(self) - 1) * self.global_batch + self.rank * self.batch_size
        real = len(self.source) - (len(self) - 1) * self.global_batch
        counts = torch.arange(first, first + self.batch_size) < len(self.source)
        return counts * (self.global_batch / real)

    def plan(self, number: int) -> Epoch:
        n = len(self.source)
        if not self.train:
            return Epoch(torch.arange(n), None)
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + number)
        rows = torch.randperm(n, generator=generator)
        return Epoch(rows, torch.rand(n, generator=generator) < 0.5 if self.flip else None)

    def share(self, plan: Epoch) -> Epoch:
        """This process's part of an epoch: its slice of each global batch, or every world-th test batch.

        The global batches are those of one process with a batch `world` times as large.
        """
        if self.train:
            part = torch.arange(len(self) * self.global_batch) % len(plan.rows)
            part = part.view(-1, self.world, self.batch_size)[:, self.rank].reshape(-1)
        else:
            batches = torch.arange(len(plan.rows)).split(self.batch_size)[self.rank :: self.world]
            part = torch.cat(batches) if batches else torch.arange(0)
        return Epoch(plan.rows[part], None if plan.flip is None else plan.flip[part])

    def epoch(self, number: int = 0, start: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
        """Batches of epoch `number` from batch `start` on."""
        plan = self.share(self.plan(number))
        yield from self.finished(plan.rows, start, plan.flip, number if self.train else None)

    def take(self, rows: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """Batches of the given rows [N] of the source, in order, unmirrored."""
        yield from self.finished(rows, 0, None, None)

    def finished(
        self, rows: Tensor, start: int, flip: Tensor | None, epoch: int | None
    ) -> Generator[tuple[Tensor, Tensor]]:
        """Batches of `rows` as the model wants them, from batch `start` on; rows of `flip` mirrored.

        `epoch` is that of the binarization's draw, None the static one.
        """
        flip = None if flip is None else flip.to(self.device)
        numbers = rows.to(self.device)
        for at, (images, labels) in self.batches(rows, start):
            part = None if flip is None else flip[at : at + len(images)]
            images = self.binarizer(images, numbers[at : at + len(images)], epoch)
            yield finish(images, part, self.normalize), labels

    def batches(self, rows: Tensor, start: int) -> Iterator[tuple[int, tuple[Tensor, Tensor]]]:
        """(offset, (uint8 images, labels)) on the device for `rows`, from batch `start` on."""
        raise NotImplementedError


class ResidentLoader(Loader):
    """The set lies on the device as uint8 (or is rendered there) and a batch is an index away.

    Image files come to lie there as they are used: the first epoch decodes them, on all processors. A prepared
    file stays where it is mapped.

    On CUDA gather, mirroring and normalisation are one compiled kernel (unless `compiled` is False, or pixels
    are drawn black or white). Not on a CPU: there it took 0.6 to 0.8 of the time of `pick` and `finish` without
    mirroring and 3 to 20 times as long with it, byte by byte where they copy whole images.
    """

    def __init__(
        self, source: Any, batch_size: int, device: torch.device, compiled: bool = True, **options: Any
    ) -> None:
        if isinstance(source, ImageFiles):
            source = DecodedFiles(source, device)
        super().__init__(source, batch_size, device, **options)
        if hasattr(source, "to"):
            source.to(device)
        self.compiled = compiled and device.type == "cuda"

    def finished(
        self, rows: Tensor, start: int, flip: Tensor | None, epoch: int | None
    ) -> Generator[tuple[Tensor, Tensor]]:
        """As in Loader; what lies on a GPU is indexed there, and nothing of it waits for the device."""
        fused = self.compiled and self.binarizer.mode == "none" and hasattr(self.source, "table")
        table = self.source.table(rows) if fused else None
        if table is None:
            yield from super().finished(rows, start, flip, epoch)
            return
        rows, flip = rows.to(self.device), None if flip is None else flip.to(self.device)
        for at in range(start * self.batch_size, len(rows), self.batch_size):
            here = slice(at, at + self.batch_size)
            yield self.batch_of(*table, rows[here], None if flip is None else flip[here], self.normalize)

    @cached_property
    def batch_of(self) -> Callable[..., tuple[Tensor, Tensor]]:
        """This loader's own compiled gather: the sets of other loaders are no recompilation of it."""
        return compiled_batch_of()

    def batches(self, rows: Tensor, start: int) -> Iterator[tuple[int, tuple[Tensor, Tensor]]]:
        starts = range(start * self.batch_size, len(rows), self.batch_size)
        if not getattr(self.source, "on_host", False):
            rows = rows.to(self.device)
            for at in starts:
                yield at, self.source.gather(rows[at : at + self.batch_size])
            return
        # What is decoded or read from a mapped file is so while the step before is computed.
        gathered = (self._gather(rows[at : at + self.batch_size]) for at in starts)
        with closing(ahead(gathered, depth=2)) as ready:
            for at, (images, labels) in zip(starts, ready, strict=True):
                yield at, (images.to(self.device, non_blocking=True), labels.to(self.device, non_blocking=True))

    def _gather(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        images, labels = self.source.gather(rows)
        if self.device.type == "cuda" and not images.is_cuda:  # a copy that nobody waits for starts here
            images = images.pin_memory()
        return images, labels.pin_memory() if self.device.type == "cuda" else labels


def compiled_batch_of() -> Callable[..., tuple[Tensor, Tensor]]:
    return torch.compile(with_own_code(batch_of), fullgraph=True)


class DecodedFiles:
    """Image files that are decoded at their first use and kept on the device as uint8 from then on."""

    on_host = True  # which rows are wanted is known on the host, without asking the device

    def __init__(self, source: ImageFiles, device: torch.device) -> None:
        self.source, self.device = source, device
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
        self.present = torch.zeros(len(source), dtype=torch.bool)

    def __len__(self) -> int:
        return len(self.source)

    def gather(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Rows [B] on the host to images [B, C, S, S] uint8 and labels [B]."""
        new = rows[~self.present[rows]]
        if len(new):
            items = in_threads(self.source.__getitem__, new.tolist())
            self.images[new.to(self.device)] = stack(items)[0].to(self.device)
            self.present[new] = True
        return pick(self.images, rows.to(self.device)), self.labels[rows]

    def table(self, rows: Tensor) -> tuple[Tensor, Tensor] | None:
        """All images and labels on the device once every one of `rows` is there."""
        return (self.images, self.labels.to(self.device)) if bool(self.present[rows].all()) else None


class TorchLoader(Loader):
    """torch's DataLoader with `num_workers` processes: the fallback for what does not fit on the device."""

    def __init__(
        self, source: Any, batch_size: int, device: torch.device, num_workers: int = 0, **options: Any
    ) -> None:
        super().__init__(source, batch_size, device, **options)
        self.num_workers = num_workers

    def batches(self, rows: Tensor, start: int) -> Iterator[tuple[int, tuple[Tensor, Tensor]]]:
        at = start * self.batch_size
        loader: torch.utils.data.DataLoader = torch.utils.data.DataLoader(
            _Items(self.source),
            batch_size=self.batch_size,
            sampler=rows[at:].tolist(),
            num_workers=self.num_workers,
            pin_memory=self.device.type == "cuda",
            # The workers' base seed would otherwise be drawn from training's own random state.
            generator=torch.Generator().manual_seed(self.seed),
        )
        batches = iter(loader)
        try:
            for images, labels in batches:
                yield at, (images.to(self.device, non_blocking=True), labels.to(self.device, non_blocking=True))
                at += len(images)
        except ValueError as error:  # a worker's comes with its traceback as text
            # The error's own traceback keeps the workers alive until the garbage collector finds it.
            if stop := getattr(batches, "_shutdown_workers", None):
                stop()
            raise ValueError(str(error).strip().splitlines()[-1].removeprefix("ValueError: ")) from None


class _Items(torch.utils.data.Dataset):
    """An image source seen one item at a time, as a DataLoader wants it."""

    def __init__(self, source: Any) -> None:
        self.source = source

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, i: int) -> tuple[Tensor, Tensor | int]:
        if hasattr(self.source, "gather"):
            images, labels = self.source.gather(torch.tensor([i]))
            return images[0], labels[0]
        return self.source[i]


def set_bytes(source: ImageFiles) -> int:
    return len(source) * source.channels * source.size**2
