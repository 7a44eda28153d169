"""Two loaders under one interface: `epoch(number, start)` yields (images, labels) on the device.

Order and mirroring of an epoch are a function of the seed, the epoch's number and nothing else, so a position
is two integers, a resumed epoch continues exactly, and both loaders give the same batches. An iterator's
images are float32 [B, C, S, S] in the model's data range; labels are int64 [B].
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from movae_fast.data.sets import Source
from movae_fast.data.transforms import finish


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
        rank: int = 0,
        world: int = 1,
    ) -> None:
        self.source, self.batch_size, self.device = source, batch_size, device
        self.rank, self.world = rank, world
        self.train, self.seed, self.flip, self.normalize = train, seed, flip and train, normalize
        if train and len(source) < batch_size * world:
            processes = f" on {world} processes" if world > 1 else ""
            raise ValueError(
                f"--batch_size {batch_size}{processes} is more than the {len(source)} training images: the "
                "last, incomplete batch of an epoch is dropped, so an epoch would hold none"
            )

    def __len__(self) -> int:
        """Batches an epoch, of this process: training drops the incomplete last one, evaluation keeps it."""
        if self.train:
            return len(self.source) // (self.batch_size * self.world)
        every = -(-len(self.source) // self.batch_size)
        return len(range(self.rank, every, self.world))

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
            part = torch.arange(len(self) * self.batch_size * self.world)
            part = part.view(-1, self.world, self.batch_size)[:, self.rank].reshape(-1)
        else:
            batches = torch.arange(len(plan.rows)).split(self.batch_size)[self.rank :: self.world]
            part = torch.cat(batches) if batches else torch.arange(0)
        return Epoch(plan.rows[part], None if plan.flip is None else plan.flip[part])

    def epoch(self, number: int = 0, start: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
        """Batches of epoch `number` from batch `start` on."""
        plan = self.share(self.plan(number))
        flip = None if plan.flip is None else plan.flip.to(self.device)
        for at, (images, labels) in self.batches(plan.rows, start):
            part = None if flip is None else flip[at : at + len(images)]
            yield finish(images, part, self.normalize), labels

    def take(self, rows: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """Batches of the given rows [N] of the source, in order, unmirrored."""
        for _, (images, labels) in self.batches(rows, 0):
            yield finish(images, None, self.normalize), labels

    def batches(self, rows: Tensor, start: int) -> Iterator[tuple[int, tuple[Tensor, Tensor]]]:
        """(offset, (uint8 images, labels)) on the device for `rows`, from batch `start` on."""
        raise NotImplementedError


class ResidentLoader(Loader):
    """The set lies on the device as uint8 (or is rendered there) and a batch is an index away."""

    def __init__(self, source: Any, batch_size: int, device: torch.device, **options: Any) -> None:
        super().__init__(source, batch_size, device, **options)
        if hasattr(source, "to"):
            source.to(device)

    def batches(self, rows: Tensor, start: int) -> Iterator[tuple[int, tuple[Tensor, Tensor]]]:
        rows = rows.to(self.device)
        for at in range(start * self.batch_size, len(rows), self.batch_size):
            yield at, self.source.gather(rows[at : at + self.batch_size])


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
        for images, labels in loader:
            yield at, (images.to(self.device, non_blocking=True), labels.to(self.device, non_blocking=True))
            at += len(images)


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


LOADERS = {"resident": ResidentLoader, "torch": TorchLoader}


def choose_loader(name: str, source: Source) -> str:
    """The loader that `auto` means: resident unless images are files to be decoded."""
    if name != "auto":
        return name
    return "resident" if hasattr(source, "gather") else "torch"
