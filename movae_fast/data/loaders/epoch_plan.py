"""Plan an epoch: the order of its images, which of them are mirrored, and which of them each process gets.

The order and mirroring of an epoch depend only on the seed and the epoch's number. So two integers, epoch and
batch, are a position from which training resumes exactly, and all loaders give the same batches.

Several processes divide the global batches of a single process among them. If their number changes on resume
and the global batch keeps its size, training continues with the same images in the same steps. The last images
of an epoch, which do not fill a global batch, are left out of this epoch (another epoch leaves out others). Or,
with `pad`, the batch is filled up with images of the same epoch, which get the sample weight 0. Evaluation
counts every image exactly once.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass
class EpochPlan:
    """Hold the order of the images in an epoch, of all processes or of one."""

    rows: Tensor  # [N] int64 on the CPU, rows of the source
    flip: Tensor | None  # [N] bool on the CPU, which of them to mirror


@dataclass(frozen=True)
class Batching:
    """Describe how the images of a source are divided into batches and among processes."""

    n: int  # images in the source
    batch_size: int  # of one process
    rank: int = 0
    world: int = 1
    train: bool = True
    pad: bool = False  # Fill up the last global batch; for training only.

    @property
    def global_batch(self) -> int:
        """Return the number of images per step, over all processes."""
        return self.batch_size * self.world

    def __len__(self) -> int:
        """Return the number of this process's batches per epoch.

        An incomplete last batch is left out or filled up when training; evaluation keeps it.
        """
        if self.train:
            return (self.n + self.pad * (self.global_batch - 1)) // self.global_batch
        all_batches = -(-self.n // self.batch_size)
        return len(range(self.rank, all_batches, self.world))

    def part_of_rank(self, plan: EpochPlan) -> EpochPlan:
        """Return this process's part of an epoch: its slice of each global batch or, in evaluation, every
        `world`-th batch.

        The global batches are those of one process whose batch is `world` times as large.
        """
        if self.train:
            places = torch.arange(len(self) * self.global_batch) % len(plan.rows)
            places = places.view(-1, self.world, self.batch_size)[:, self.rank].reshape(-1)
        else:
            batches = torch.arange(len(plan.rows)).split(self.batch_size)[self.rank :: self.world]
            places = torch.cat(batches) if batches else torch.arange(0)
        return EpochPlan(plan.rows[places], None if plan.flip is None else plan.flip[places])

    def last_weights(self) -> Tensor:  # [B] float32
        """Return the sample weights of the images in a last batch that was filled up; those that fill it have
        weight 0.

        Over all processes the weights are 1 on average.
        """
        first = (len(self) - 1) * self.global_batch + self.rank * self.batch_size
        real = self.n - (len(self) - 1) * self.global_batch
        counted = torch.arange(first, first + self.batch_size) < self.n
        return counted * (self.global_batch / real)


def plan_epoch(n: int, seed: int, number: int, flip: bool) -> EpochPlan:
    """Return the shuffled order of n images for training epoch `number`; with `flip` a random half of them is
    mirrored."""
    generator = torch.Generator().manual_seed(seed * 1_000_003 + number)
    rows = torch.randperm(n, generator=generator)
    return EpochPlan(rows, torch.rand(n, generator=generator) < 0.5 if flip else None)
