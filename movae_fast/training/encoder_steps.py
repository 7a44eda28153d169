"""Run the training steps of the encoder alone that precede a step of the decoder."""

from __future__ import annotations

import torch

from movae_fast.choices import PAD
from movae_fast.data.text import TextLoader
from movae_fast.training.aggressive import Falling
from movae_fast.training.run import Run
from movae_fast.training.train_step import Part


def train_encoder(run: Run) -> Part:
    """Train the encoder alone until its loss stops falling; return which parameters the next step has to
    update.

    The first step uses the run's next batch, later ones batches that are drawn from the epoch's with
    replacement, depending on seed and step only. Outside the aggressive phase nothing is done, and the next
    step updates all parameters. The processes sum their losses, so all of them stop at the same step.
    """
    phase, loader = run.aggressive, run.train_loader
    if phase is None or not phase.on:
        return Part.ALL
    assert isinstance(loader, TextLoader)
    generator = torch.Generator().manual_seed((run.config.run.seed or 0) * 1_000_003 + run.step)
    others = torch.randint(len(loader), (phase.steps - 1,), generator=generator).tolist()
    falling = Falling(phase.window)
    for number in [run.batch, *others]:
        x, _, counts = loader.batch(number)
        metrics = run.train_step(x, run.step, run.noise(len(x)), sample_weight=counts, part=Part.SHARED)
        phase.taken += 1
        tokens = (x[:, 1:] != PAD).sum(1)
        tokens = (tokens if counts is None else tokens * counts).sum()
        loss = (metrics.losses * run.losses.weights_at(run.step)).sum()
        if not falling.goes_on(run.world.sum_(torch.stack([loss * len(x), tokens]).double())):
            break
    return Part.TASK
