"""Divide encoded rows into those that a prior is fitted to and those held out, and plan its batches.

A batch, and every random number of a step, is a function of the seed and the step's number: a resumed prior
goes on with the same ones, and several processes take their slices of those of one.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from movae_fast.data.loaders.epoch_plan import Batching, EpochPlan, plan_epoch
from movae_fast.priors.latents import Latents

DRAWS, DROPOUT, EVALUATION = range(3)  # what a generator is for


@dataclass(frozen=True)
class Rows:
    """Hold the rows to fit to and those held out; an image and its mirror image are on one side."""

    fitted: Tensor  # [N] int64
    held_out: Tensor  # [M] int64


def divide(latents: Latents, held_out: float) -> Rows:
    """Hold out evenly spaced images, at least one, and nothing if the fraction is 0."""
    n = latents.images
    count = min(n - 1, max(1, round(held_out * n))) if held_out > 0 else 0
    out = torch.zeros(n, dtype=torch.bool)
    if count:
        out[torch.arange(count) * n // count] = True
    rows = torch.arange(len(latents.values))
    mask = out.repeat(len(latents.values) // n)
    return Rows(rows[~mask], rows[mask])


def batch_rows(rows: Tensor, step: int, batch_size: int, rank: int, world: int, seed: int) -> Tensor:
    """Return this process's rows of a step; epochs are complete batches of a shuffle each.

    Fewer rows than a global batch are filled up by repetition.
    """
    if len(rows) < batch_size * world:
        rows = rows.repeat(-(-batch_size * world // len(rows)))
    batching = Batching(len(rows), batch_size, rank, world)
    epoch, batch = divmod(step, len(batching))
    plan: EpochPlan = batching.part_of_rank(plan_epoch(len(rows), seed, epoch, False))
    return rows[plan.rows[batch * batch_size : (batch + 1) * batch_size]]


def generator_of(seed: int, step: int, purpose: int, rank: int = 0) -> torch.Generator:
    """Return the generator of a step's random numbers for a purpose."""
    mixed = ((seed * 1_000_003 + step) * 7 + purpose) * 4099 + rank
    return torch.Generator().manual_seed(mixed % (1 << 63))
