"""Divide encoded rows into those that a prior is fitted to and held-out ones, and plan the batches.

Batches and random numbers depend only on the seed and the step's number. So a resumed prior continues with the
same ones, and several processes share the batches of one.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from movae_fast.data.loaders.epoch_plan import Batching, EpochPlan, plan_epoch
from movae_fast.priors.latents import Latents

DRAWS, DROPOUT, EVALUATION = range(3)  # the purposes of `generator_of`


@dataclass(frozen=True)
class Rows:
    """Hold the rows to fit to and the held-out rows; an image and its mirror image are always in the same
    part."""

    fitted: Tensor  # [N] int64
    held_out: Tensor  # [M] int64


def divide(latents: Latents, held_out: float) -> Rows:
    """Hold out a fraction of the images, evenly spaced and at least one; none if the fraction is 0."""
    n = latents.images
    count = min(n - 1, max(1, round(held_out * n))) if held_out > 0 else 0
    out = torch.zeros(n, dtype=torch.bool)
    if count:
        out[torch.arange(count) * n // count] = True
    rows = torch.arange(len(latents.values))
    mask = out.repeat(len(latents.values) // n)
    return Rows(rows[~mask], rows[mask])


def batch_rows(rows: Tensor, step: int, batch_size: int, rank: int, world: int, seed: int) -> Tensor:
    """Return this process's rows for a step; each epoch is a new shuffle, cut into whole batches.

    If there are fewer rows than a global batch, they are repeated.
    """
    if len(rows) < batch_size * world:
        rows = rows.repeat(-(-batch_size * world // len(rows)))
    batching = Batching(len(rows), batch_size, rank, world)
    epoch, batch = divmod(step, len(batching))
    plan: EpochPlan = batching.part_of_rank(plan_epoch(len(rows), seed, epoch, False))
    return rows[plan.rows[batch * batch_size : (batch + 1) * batch_size]]


def generator_of(seed: int, step: int, purpose: int, rank: int = 0) -> torch.Generator:
    """Return the generator for the random numbers of a step; each `purpose` has numbers of its own."""
    mixed = ((seed * 1_000_003 + step) * 7 + purpose) * 4099 + rank
    return torch.Generator().manual_seed(mixed % (1 << 63))
