"""`movae generate`: samples from the prior, one file an image and a grid, with torch-vae's flags."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from movae_fast.cli import parsing
from movae_fast.data import to_unit
from movae_fast.figures import grid, write_png
from movae_fast.models import MODELS, VAE, model_options
from movae_fast.training.config import TrainConfig, check_room, resolve_device
from movae_fast.training.limits import check_values
from movae_fast.training.run import load_model

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
    check_model(trained, model, config.latent_dim, config.max_filters)
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


def check_model(trained: TrainConfig, model: VAE, latent_dim: int | None, max_filters: int | None) -> None:
    """Refuse a model that is not the one described on the command line."""
    for name, wanted in (("latent_dim", latent_dim), ("max_filters", max_filters)):
        if wanted is None:
            continue
        if name not in model_options(trained.model.arch):
            raise ValueError(f"--{name} {wanted}: {trained.model.arch} has no such option; leave it out")
        if wanted != (has := option_of(trained, model, name)):
            raise ValueError(f"--{name} {wanted}: the model has {has}")


def option_of(trained: TrainConfig, model: VAE, name: str) -> Any:
    """Return an option as the model was built with it, given or by default; None if it has no such option."""
    arch = trained.model.arch
    if name not in model_options(arch):
        return None
    if (given := getattr(trained.model, name)) is not None:
        return given
    default = inspect.signature(MODELS[arch].__init__).parameters[name].default
    # Where the default depends on the size of the images, the model knows what became of it.
    return getattr(model, name, None) if default is None else default


def new_outdir(folder: Path) -> Path:
    """The folder, made; refused if it holds anything."""
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(f"--outdir: {folder} is not empty and is not overwritten; name another folder")
    folder.mkdir(parents=True, exist_ok=True)
    return folder
