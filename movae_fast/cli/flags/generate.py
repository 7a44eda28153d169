"""Define and check the flags of `movae generate`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from movae_fast.cli import parsing
from movae_fast.training.limits import check_values
from movae_fast.training.run_list import find_run

DESCRIPTION = "Draw samples from a trained model's prior: OUTDIR/img_000000.png, … and OUTDIR/all.png."


@dataclass
class GenerateConfig:
    """Generation.

    Args:
        model: The run's folder, a checkpoint, or exported weights.
        outdir: New or empty folder for the pictures.
        nsamples: Number of images.
        nimg_channels: If given, the channels that the model must have (1 grey, 3 RGB).
        latent_dim: If given, the number of latents that the model must have.
        max_filters: If given, the widest convolution that the model must have.
        prior: What the images are drawn from: the prior that `movae prior` fitted last (auto), one by name, or
            none; then codes are drawn by their usage, and latents from the model's own prior.
        seed: Seed of the draws.
        device: `auto`, `cpu`, `cuda` or `cuda:1`.
    """

    model: str
    outdir: str
    nsamples: int = 8
    nimg_channels: int | None = None
    latent_dim: int | None = None
    max_filters: int | None = None
    prior: str = "auto"
    seed: int = 0
    device: str = "auto"


def parse(argv: Sequence[str]) -> GenerateConfig:
    """Return the flags of `movae generate` with the run as a path. Raises ValueError for an invalid flag or
    unknown run."""
    config = parsing.read_flags(GenerateConfig, "generate", DESCRIPTION, argv)
    check_values(config)
    config.model = str(find_run(config.model))
    return config
