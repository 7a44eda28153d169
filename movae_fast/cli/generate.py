"""Run `movae generate`: samples from the prior, one file per image and a grid, with torch-vae's flags."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from movae_fast.cli import parsing
from movae_fast.cli.trained import new_outdir
from movae_fast.data import to_unit
from movae_fast.evaluation.trained import check_option
from movae_fast.pictures import grid, write_png
from movae_fast.training.build import load_model
from movae_fast.training.config_checks import check_room
from movae_fast.training.device import resolve_device
from movae_fast.training.limits import check_values

DESCRIPTION = "Draw samples from a model's prior: OUTDIR/img_000000.png, … and OUTDIR/all.png."


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
        seed: Seed of the draws.
        device: `auto`, `cpu`, `cuda` or `cuda:1`.
    """

    model: str
    outdir: str
    nsamples: int = 8
    nimg_channels: int | None = None
    latent_dim: int | None = None
    max_filters: int | None = None
    seed: int = 0
    device: str = "auto"


@torch.no_grad()
def run(argv: Sequence[str]) -> int:
    """Parse, load, draw; the exit status."""
    words = parsing.normalise(argv, parsing.flag_types([GenerateConfig]))
    parser = parsing.build_parser("generate", [GenerateConfig], DESCRIPTION)
    config = GenerateConfig(**parsing.parse(parser, words, {}))
    check_values(config)
    trained, model = load_model(Path(config.model), resolve_device(config.device))
    for name in ("latent_dim", "max_filters"):
        check_option(trained, model, name, getattr(config, name))
    channels = trained.image_shape[0]
    if config.nimg_channels not in (None, channels):
        raise ValueError(f"--nimg_channels {config.nimg_channels}: the model has {channels}")
    check_room(f"--nsamples {config.nsamples}", config.nsamples, trained.image_shape)
    folder = new_outdir(Path(config.outdir))
    generator = torch.Generator().manual_seed(config.seed)
    images = to_unit(model.sample(config.nsamples, generator), trained.data.normalize)
    for i, image in enumerate(images):
        write_png(folder / f"img_{i:06d}.png", grid(image[None], scale=1))
    write_png(folder / "all.png", grid(images, columns=8))
    print(f"{config.nsamples} pictures in {folder}, all of them in {folder / 'all.png'}")
    return 0
