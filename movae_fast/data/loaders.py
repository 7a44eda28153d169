"""Loaders under one interface: `epoch(number, start)` yields (images, labels) on the device.

Order and mirroring of an epoch are a function of the seed, the epoch's number and nothing else, so a position
is two integers, a resumed epoch continues exactly, and all loaders give the same batches (`dali`'s pixels are
its own decoder's, within a grey level or two). An iterator's images are float32 [B, C, S, S] in the model's
data range; labels are int64 [B].

Several processes share the global batches of one: changing their number on resume, with the global batch kept,
goes on with the same images in the same steps. The last images of an epoch that fill no global batch are left
out of it; another epoch's shuffle leaves out others. Evaluation counts every image exactly once.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from movae_fast.data.machine import in_threads
from movae_fast.data.sources import ImageFiles, stack
from movae_fast.data.transforms import Binarizer, finish


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
    ) -> None:
        self.source, self.batch_size, self.device = source, batch_size, device
        self.binarizer = binarizer or Binarizer("none", "train" if train else "test", seed)
        self.rank, self.world = rank, world
        self.train, self.seed, self.flip, self.normalize = train, seed, flip and train, normalize
        self.why = ""  # this loader and not another, for whoever asked for `auto`
        if train and len(source) < batch_size * world:
            processes = f" on {world} processes" if world > 1 else ""
            raise ValueError(
                f"--batch_size {batch_size}{processes} is more than the {len(source)} training images: the "
                "last, incomplete batch of an epoch is dropped, so an epoch would hold none"
            )

    @property
    def note(self) -> str:
        """What is worth knowing about the source: prepared, out of date."""
        return getattr(getattr(self.source, "source", self.source), "note", "")

    @property
    def left_out(self) -> list[str]:
        """The unreadable files that the source does without, each with the reason."""
        return getattr(getattr(self.source, "source", self.source), "skipped", [])

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
        rows = plan.rows.to(self.device)
        for at, (images, labels) in self.batches(plan.rows, start):
            part = None if flip is None else flip[at : at + len(images)]
            images = self.binarizer(images, rows[at : at + len(images)], number if self.train else None)
            yield finish(images, part, self.normalize), labels

    def take(self, rows: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """Batches of the given rows [N] of the source, in order, unmirrored."""
        for at, (images, labels) in self.batches(rows, 0):
            images = self.binarizer(images, rows[at : at + len(images)], None)
            yield finish(images, None, self.normalize), labels

    def batches(self, rows: Tensor, start: int) -> Iterator[tuple[int, tuple[Tensor, Tensor]]]:
        """(offset, (uint8 images, labels)) on the device for `rows`, from batch `start` on."""
        raise NotImplementedError


class ResidentLoader(Loader):
    """The set lies on the device as uint8 (or is rendered there) and a batch is an index away.

    Image files come to lie there as they are used: the first epoch decodes them, on all processors. A prepared
    file stays where it is mapped.
    """

    def __init__(self, source: Any, batch_size: int, device: torch.device, **options: Any) -> None:
        if isinstance(source, ImageFiles):
            source = DecodedFiles(source, device)
        super().__init__(source, batch_size, device, **options)
        if hasattr(source, "to"):
            source.to(device)

    def batches(self, rows: Tensor, start: int) -> Iterator[tuple[int, tuple[Tensor, Tensor]]]:
        starts = range(start * self.batch_size, len(rows), self.batch_size)
        if not getattr(self.source, "on_host", False):
            rows = rows.to(self.device)
            for at in starts:
                yield at, self.source.gather(rows[at : at + self.batch_size])
            return
        # What is decoded or read from a mapped file is so while the step before is computed.
        with ThreadPoolExecutor(1) as ahead:
            parts = rows[starts.start :].split(self.batch_size) if starts else ()
            coming: deque[Future[tuple[Tensor, Tensor]]] = deque()
            for i, at in enumerate(starts):
                while len(coming) < 2 and i + len(coming) < len(starts):
                    coming.append(ahead.submit(self.source.gather, parts[i + len(coming)]))
                images, labels = coming.popleft().result()
                yield at, (images.to(self.device), labels.to(self.device))


class DecodedFiles:
    """Image files that are decoded at their first use and kept on the device as uint8 from then on."""

    on_host = True  # which rows are wanted is known on the host, without asking the device

    def __init__(self, source: ImageFiles, device: torch.device) -> None:
        self.source, self.device = source, device
        shape = (len(source), source.channels, source.size, source.size)
        try:
            self.images = torch.empty(shape, dtype=torch.uint8, device=device)
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
        return self.images.index_select(0, rows.to(self.device)), self.labels[rows]


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
